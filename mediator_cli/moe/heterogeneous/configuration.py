"""The config of a heterogeneous Mixture of Experts: plain data, as it stands in config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mediator_cli.checkpoint.heterogeneous import MODEL_TYPE

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class ProjectorConfig:
    """Shape of all projectors: linear layers, width of inner ones (None: of the wider end), function between them.

    `skip` adds the expert's own coordinates past the layers.
    """

    depth: int = 1
    width: int | None = None
    activation: str = "gelu"
    skip: bool = True


class HeterogeneousMoeConfig(PreTrainedConfig):
    """What a heterogeneous Mixture of Experts is made of.

    `experts` are mappings with `name`, `start` (of its coordinates in the shared width), `width` and `config`, that of
    its own model; `experts_per_prompt` is the router's top-k, `projector` the fields of ProjectorConfig.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ("past_key_values", "mixture", "router_logits")

    def __init__(  # noqa: PLR0913 - the fields of config.json
        self,
        vocab_size: int = 0,
        hidden_size: int = 0,
        experts: Sequence[dict[str, Any]] = (),
        experts_per_prompt: int = 1,
        projector: dict[str, Any] | None = None,
        head_bias: bool = False,
        router_aux_loss_coef: float = 0.0,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        **others: Any,  # noqa: ANN401 - what all configs have
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.experts = [dict(expert) for expert in experts]
        self.experts_per_prompt = experts_per_prompt
        self.projector = dict(projector or {})
        self.head_bias = head_bias
        self.router_aux_loss_coef = router_aux_loss_coef
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **others})

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names of the experts, in the order of the router's rows."""
        return tuple(expert["name"] for expert in self.experts)

    @property
    def projector_config(self) -> ProjectorConfig:
        """The shape of the projectors."""
        return ProjectorConfig(**self.projector)

    def expert_config(self, number: int) -> PreTrainedConfig:
        """Make the config of one expert's own model."""
        data = dict(self.experts[number]["config"])
        config: PreTrainedConfig = CONFIG_MAPPING[data["model_type"]].from_dict(data)
        # The body is stored in the dtype of the whole.
        config.dtype = self.dtype
        return config
