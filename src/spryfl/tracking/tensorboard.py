"""Rounds as TensorBoard event files, in the run directory. Nothing leaves the machine."""

from pathlib import Path

from spryfl.errors import SpryError
from spryfl.tracking.events import Observer, RoundEvent, Summary

OF_EVALUATIONS = ("test_loss", "generalized", "personalized")
SCALARS = ("loss", *OF_EVALUATIONS, "bytes_up", "bytes_down", "seconds", "peak_activation_bytes", "epsilon")


class TensorBoardObserver(Observer):
    """Writes one scalar series for each figure of a round."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SpryError("--tensorboard needs TensorBoard: pip install 'spryfl[tensorboard]'") from error
        self._writer = SummaryWriter(log_dir=str(folder))

    def round_finished(self, event: RoundEvent) -> None:
        own = {name: getattr(event, name) for name in SCALARS}
        for name, value in (own | event.metrics).items():
            if value is not None:
                self._writer.add_scalar(name, value, event.round)
        self._writer.flush()

    def finished(self, summary: Summary) -> None:
        self._writer.close()
