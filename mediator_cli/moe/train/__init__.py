"""Short fine-tuning of a Mixture of Experts: gates, gates and attention, or all."""

from mediator_cli.moe.train.run import train
from mediator_cli.moe.train.settings import TrainSettings

__all__ = ["TrainSettings", "train"]
