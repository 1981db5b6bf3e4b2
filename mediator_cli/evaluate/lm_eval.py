"""lm-evaluation-harness with bundles: its own command line, which knows the model `mediator` beside its own.

The harness has no way to find models of other packages, so its command is started from here:

    python -m mediator_cli.evaluate.lm_eval --model mediator --model_args pretrained=DIR::maths --tasks hellaswag
"""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry

from mediator_cli.errors import MediatorError
from mediator_cli.evaluate.harness import HarnessModel, load_for_harness
from mediator_cli.evaluate.models import find_candidates

NAME = "mediator"


class NamedModel(HarnessModel):
    """A model that the harness makes of its arguments: `pretrained` is a bundle, DIR::EXPERT, a folder or an adapter.

    An adapter needs its `base`. Sizes of batches and the device are chosen by ourselves, whatever the harness says.
    """

    def __init__(
        self,
        pretrained: str,
        base: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        (candidate,) = find_candidates([pretrained], (), base)
        super().__init__(*load_for_harness(candidate))


def register() -> None:
    """Make `mediator` a model of the harness in this process."""
    import lm_eval.models  # noqa: F401 - names the harness's own models, as long as there is none of another's

    model_registry.register(NAME)(NamedModel)


def main() -> int:
    """Run the harness's command line; say what is wrong as `mediator` does."""
    register()
    try:
        cli_evaluate()
    except MediatorError as error:
        for problem in error.problems:
            sys.stderr.write(f"error: {problem}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
