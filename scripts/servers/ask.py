"""Ask servers in processes of their own, and compare what they answer with transformers."""

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from scripts.servers.environment import FOLDER
from scripts.servers.reference import Ids, Reference, apart

HERE = Path(__file__).parent
SERVERS = ("vllm", "llama_cpp")
RIGHT = 2e-3
"""Log probabilities that differ by less are the same: rounding makes 2e-5 in vLLM, and 3e-4 in llama.cpp."""
LONGEST = 256
SECONDS_PER_MODEL = 240
SECONDS_TO_START = 180


@dataclass(frozen=True)
class Case:
    """A model folder, prompts, and what transformers makes of them; `work` is a folder for requests and answers."""

    model: Path
    prompts: Ids
    reference: Reference
    work: Path


@dataclass(frozen=True)
class Reading:
    """How a server reads a model, against transformers; `why` says what it refused.

    `apart` is the largest difference of a log probability of transformers' answers, `equal` the share of prompts with
    the same answer, `first` the place of the first other token, `lead` its lead there, in logits, in transformers.
    """

    status: str
    apart: float | None = None
    equal: float | None = None
    first: int | None = None
    lead: float | None = None
    why: str = ""


def ask(server: str, cases: Sequence[Case]) -> list[Reading]:
    """Ask a server for all cases; one that refuses a model, or dies of it, has given a reading too."""
    refused = {case.work: why for case in cases if (why := _prepare(server, case))}
    waiting = [case for case in cases if case.work not in refused]
    while waiting:
        command = [FOLDER / "bin/python", HERE / f"ask_{server}.py", *(case.work for case in waiting)]
        died = _run(command, SECONDS_TO_START + SECONDS_PER_MODEL * len(waiting))
        unanswered = [case for case in waiting if not (case.work / "answers.json").exists()]
        if unanswered:
            refused[unanswered[0].work] = died or "no answer"
        waiting = unanswered[1:]
    return [_reading(case, refused.get(case.work, "")) for case in cases]


def _prepare(server: str, case: Case) -> str:
    """Write the request; the answer is why it cannot be asked, if so."""
    (case.work / "answers.json").unlink(missing_ok=True)
    model, why = _converted(case) if server == "llama_cpp" else (case.model, "")
    request = {"model": str(model), "longest": LONGEST, "tokens": len(case.reference.tokens[0])}
    request |= {"prompts": case.prompts, "answers": case.reference.tokens}
    (case.work / "request.json").write_text(json.dumps(request), encoding="utf-8")
    return why


def _converted(case: Case) -> tuple[Path, str]:
    """Convert to GGUF in float32 by llama.cpp's own converter; the file, and why there is none."""
    target = case.work / "model.gguf"
    program = FOLDER / "llama.cpp/convert_hf_to_gguf.py"
    command = [FOLDER / "bin/python", program, case.model, "--outfile", target, "--outtype", "f32"]
    return target, _run(command, SECONDS_PER_MODEL)


def _run(command: Sequence[Path | str], seconds: float) -> str:
    """Run a program; the answer is its error, or nothing."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {seconds:.0f} s"
    return last_word(done.stderr + done.stdout, done.returncode) if done.returncode else ""


def _reading(case: Case, refused: str) -> Reading:
    answers = {"error": refused} if refused else json.loads((case.work / "answers.json").read_text(encoding="utf-8"))
    return Reading("refused", why=answers["error"][:300]) if "error" in answers else compare(case.reference, answers)


def compare(reference: Reference, answers: Mapping[str, Any]) -> Reading:
    """Compare a server's answers with transformers'."""
    far = apart(reference.logprobs, answers["logprobs"])
    both = [
        (reference.until_end(ours), reference.until_end(theirs))
        for ours, theirs in zip(reference.tokens, answers["tokens"], strict=True)
    ]
    equal = sum(ours == theirs for ours, theirs in both) / len(both)
    places = sorted(
        (next(place for place, pair in enumerate(zip_longest(ours, theirs)) if pair[0] != pair[1]), row)
        for row, (ours, theirs) in enumerate(both)
        if ours != theirs
    )
    first, row = places[0] if places else (None, None)
    lead = None if first is None or row is None else reference.leads[row][first]
    return Reading("right" if far < RIGHT else "wrong", far, equal, first, lead)


def last_word(printed: str, code: int) -> str:
    """Find the error in what a process printed: the last line that names one.

    >>> last_word("INFO: read" + chr(10) + "ValueError: no such layer" + chr(10) + "leaving", 1)
    'ValueError: no such layer'
    """
    lines = [re.sub(r"\s+", " ", line).strip() for line in printed.splitlines()]
    named = [line for line in lines if re.match(r"(\[\w+\]:? *)?[\w.]+(Error|Exception)\b", line)]
    return (named or [line for line in lines if "error" in line.lower()] or [f"exit code {code}"])[-1]


def as_json(reading: Reading) -> dict[str, Any]:
    """Give a reading without what it has not got."""
    kept = {name: value for name, value in asdict(reading).items() if value not in (None, "")}
    return {name: rounded(value) if isinstance(value, float) else value for name, value in kept.items()}


def rounded(value: float) -> float:
    """Keep three digits."""
    return float(f"{value:.2e}")
