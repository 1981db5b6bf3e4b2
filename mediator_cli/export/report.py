"""What an export of adapters reports, and files beside them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Left(_Frozen):
    """A tensor that the expert changes and the export cannot hold; `size` is |change| / |dense tensor|."""

    tensor: str
    reason: str
    size: float


class Measured(_Frozen):
    """The bundle's expert against dense + adapter on rows of the user: exact matches, and loss in nats a row."""

    task: str
    rows: int
    bundle_accuracy: float
    export_accuracy: float
    bundle_loss: float
    export_loss: float


class ExpertReport(_Frozen):
    """One expert: `origin` of its change, the share of the change (squared) that is held, over all and by layer.

    `n_adapters` is above 1 where several have to be summed; their folders are NAME-1, NAME-2 and so on.
    """

    name: str
    folder: str
    origin: str
    note: str = ""
    rank: int
    n_adapters: int = 1
    n_targets: int
    energy: float
    layers: dict[str, float] = Field(default_factory=dict)
    bytes: int
    not_carried: tuple[Left, ...] = ()
    measured: Measured | None = None

    @property
    def is_exact(self) -> bool:
        """Whether nothing of the linear weights' change is lost but rounding."""
        return self.energy > 0.99999

    def low_layers(self, threshold: float) -> dict[str, float]:
        """Give the layers whose change is held to less than a share."""
        return {layer: energy for layer, energy in self.layers.items() if energy < threshold}


class AdapterReport(_Frozen):
    """All experts of an export of adapters; `rank` is that of all targets of all experts."""

    format: str
    folder: str
    bundle: str
    rank: int
    dtype: str
    targets: tuple[str, ...]
    bytes: int
    experts: tuple[ExpertReport, ...]
    notices: tuple[str, ...] = ()
