"""Validation loss: the mean over all supervised tokens of held-out data, whatever the training loss's arithmetic."""

import torch

from lapilli.train.setup import Prepared, training_loader, training_mode


@torch.no_grad()
def validation_loss(ready: Prepared) -> float:
    """Return the loss per supervised token over the whole of `ready.validation`; the model trains on as before."""
    assert ready.validation is not None
    model = ready.loaded.model
    total, count = 0.0, 0
    model.eval()
    for step in training_loader(ready.stage, ready.how, ready.validation, order="sequential"):
        for batch in step.batches:
            with ready.device.autocast(ready.stage.run.precision):
                loss, supervised = ready.engine.module(batch.to(ready.device.device))
            total += float(loss)
            count += supervised
    training_mode(model)
    return total / max(1, count)
