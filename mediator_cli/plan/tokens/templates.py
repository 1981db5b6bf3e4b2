"""Chat templates: the one that most sources have, or one of the formats that many models were trained on."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.header import read_json
from mediator_cli.checkpoint.vocabulary import TOKENIZER_CONFIG
from mediator_cli.errors import Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from mediator_cli.recipe.load import LoadedRecipe

AUTO = "auto"
_EACH, _END = "{%- for message in messages %}", "{%- endfor %}"
_ASKED = "{%- if add_generation_prompt %}"
_SYSTEM_APART = (
    "{%- set system = messages[0]['content'] if messages and messages[0]['role'] == 'system' else '' %}"
    "{%- for message in (messages[1:] if system else messages) %}"
)
TEMPLATES = {
    "chatml": _EACH + "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}" + _END
    + _ASKED + "{{ '<|im_start|>assistant\\n' }}{%- endif %}",
    "llama3": "{{ bos_token }}" + _EACH
    + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}"
    "{{ '<|eot_id|>' }}" + _END + _ASKED + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}",
    "mistral": "{{ bos_token }}" + _SYSTEM_APART
    + "{%- if message['role'] == 'user' %}"
    "{{ ' [INST] ' + (system + '\\n\\n' if system and loop.first else '') + message['content'] + ' [/INST]' }}"
    "{%- else %}{{ ' ' + message['content'] + eos_token }}{%- endif %}" + _END,
    "alpaca": _SYSTEM_APART
    + "{%- if system and loop.first %}{{ system | trim + '\\n\\n' }}{%- endif %}"
    "{{ ('### Instruction:' if message['role'] == 'user' else '### Response:') + '\\n' }}"
    "{{ message['content'] | trim + '\\n\\n' }}" + _END + _ASKED + "{{ '### Response:\\n' }}{%- endif %}",
    "exaone": "{%- if messages and messages[0]['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{%- endif %}"
    + _EACH + "{{ '[|' + message['role'] + '|]' + message['content'] }}"
    "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}" + _END
    + _ASKED + "{{ '[|assistant|]' }}{%- endif %}",
}  # fmt: skip


def chosen_template(loaded: LoadedRecipe, folders: Iterable[Path]) -> tuple[str | None, list[Problem]]:
    """Give the text of the template that a recipe asks for, None for the tokenizer's own; or what is wrong."""
    wanted = loaded.recipe.chat_template
    if wanted is None:
        return None, []
    if wanted == AUTO:
        found = Counter(text.strip() for folder in folders if (text := own_template(folder)))
        return (found.most_common(1)[0][0] if found else None), []
    if wanted in TEMPLATES:
        return TEMPLATES[wanted], []
    if "{" in wanted:
        return wanted, []
    hint = f"{did_you_mean(wanted, [AUTO, *TEMPLATES])}, or write the template itself"
    return None, [Problem(loaded.place("chat_template"), f"no chat template '{wanted}'", hint)]


def own_template(folder: Path) -> str | None:
    """Read the chat template of a model folder; of several the one called default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", TOKENIZER_CONFIG):
        found = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(found, list):
            found = next((each.get("template") for each in found if each.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None
