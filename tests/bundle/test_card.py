"""What a model card tells of a router."""

from mediator_cli.bundle.card import router_card
from mediator_cli.bundle.router_record import PolicyRecord, RouterRecord, RouterReport


def record(n_experts: int, **fields: object) -> RouterRecord:
    confusion = [[9 * (row == column) for column in range(n_experts)] for row in range(n_experts)]
    confusion[0][1], confusion[1][0] = 3, 1
    known = {
        "features": "text", "classifier": "ridge", "experts": tuple(f"e{n}" for n in range(n_experts)), "size": 8,
        "temperature": 1.0, "outside_above": 1.0, "policy": PolicyRecord(),
        "file": {"name": "r", "bytes": 1, "sha256": ""},
        "report": RouterReport(
            n_fitted=9, n_held_out=40, accuracy=0.9, log_loss=0.1, calibration_error=0.01, confusion=confusion
        ),
    }  # fmt: skip
    return RouterRecord.model_validate(known | fields)


def test_few_experts_have_a_table_of_who_is_taken_for_whom() -> None:
    card = router_card(record(3))
    assert "| prompts of | taken for e0 | taken for e1 | taken for e2 |" in card
    assert "| e0 | 9 | 3 | 0 |" in card


def test_of_many_experts_only_the_worst_pairs_are_told() -> None:
    card = router_card(record(64))
    assert "Most often mistaken: e0 for e1 (3); e1 for e0 (1)." in card
    assert "|" not in card


def test_a_router_that_reads_nothing_says_so() -> None:
    policy = PolicyRecord(rule="fixed", weights={"e0": 0.5, "e1": 0.5})
    fields = {"features": "none", "classifier": "none", "outside_above": None, "report": None, "file": None}
    assert "Every prompt gets the same mixture" in router_card(record(2, policy=policy, **fields))
