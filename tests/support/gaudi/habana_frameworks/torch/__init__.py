"""Where PyTorch learns of the device."""
