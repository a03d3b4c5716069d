"""What every floor may use: errors, image layout, atomic folders, progress, HTML pieces. No torch here."""
