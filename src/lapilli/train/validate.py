"""Validation loss: the mean over all supervised tokens of held-out data, whatever the training loss's arithmetic."""

import torch

from lapilli.train.setup import Prepared, training_loader, training_mode


@torch.no_grad()
def validation_loss(ready: Prepared) -> float:
    """Return the loss per supervised token over the whole of `ready.validation`; the model trains on as before.

    The processes of a run share the data.
    """
    assert ready.validation is not None
    model, engine, world = ready.loaded.model, ready.engine, ready.engine.world
    total, count = 0.0, 0.0
    model.eval()
    sources = ready.stage.data.validation
    with world.together():
        loader = training_loader(
            ready.stage, ready.how, ready.validation, sources, order="sequential", world=world, shapes=ready.shapes
        )
        steps = iter(loader)
    for _ in range(len(loader)):
        with world.together():
            passes = engine.level(next(steps).batches)
        with engine.passing():
            for batch, pictures in passes:
                with ready.device.autocast(ready.stage.run.precision):
                    loss = engine.module(batch.to(ready.device.device), pictures)
                ready.device.cut_graph()
                total += float(loss)
                count += batch.weight
    training_mode(model)
    engine.resting()
    parts = world.exchange([total, count])
    total, count = (sum(column) for column in zip(*parts, strict=True))
    return total / count if count else 0.0
