"""The model class: its sums against plain ones, generation, batches, training losses, saving and loading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from unlike_models import SIZES

from mediator_cli.moe.heterogeneous import HeterogeneousMoeConfig, HeterogeneousMoeForCausalLM
from mediator_cli.moe.heterogeneous.routing import balance_loss, before_labels, mixture_of, prompt_mean

N_TOKENS = 30


def make(kinds=("llama", "gpt_neox", "lfm2"), top_k: int = 2, **fields) -> HeterogeneousMoeForCausalLM:
    own = {"gpt_neox": {"hidden_size": 24}, "lfm2": {"layer_types": ["conv", "full_attention"]}}
    configs = [AutoConfig.for_model(k, **{**SIZES, "vocab_size": 40, **own.get(k, {})}).to_dict() for k in kinds]
    experts = [
        {"name": f"e{n}", "start": 0, "width": config["hidden_size"], "config": config}
        for n, config in enumerate(configs)
    ]
    config = HeterogeneousMoeConfig(
        vocab_size=N_TOKENS, hidden_size=24, experts=experts, experts_per_prompt=top_k, initializer_range=0.3,
        projector={"depth": 2, "width": 20}, pad_token_id=0, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    model = HeterogeneousMoeForCausalLM(config).eval()
    with torch.no_grad():
        # Experts that are chosen by some prompts each.
        model.router.weight *= 20
    return model


@pytest.fixture(scope="module")
def model() -> HeterogeneousMoeForCausalLM:
    return make()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, N_TOKENS, (5, 7), generator=torch.Generator().manual_seed(0))


def test_logits_are_the_head_of_the_weighted_sum_of_experts(model, ids):
    output = model(ids)
    embedded = model.embed.weight[ids]
    logits = embedded.mean(dim=1) @ model.router.weight.T + model.router.bias
    expected = torch.zeros(5, 7, 24)
    for row in range(5):
        best = logits[row].argsort(descending=True)[:2]
        weights = torch.exp(logits[row, best]) / torch.exp(logits[row, best]).sum()
        for weight, number in zip(weights, best, strict=True):
            expert = model.experts[number]
            states = expert.body(inputs_embeds=expert.proj_in(embedded[row : row + 1])).last_hidden_state
            expected[row] += weight * expert.proj_out(states)[0]
    torch.testing.assert_close(output.logits, expected @ model.head.weight.T, rtol=0, atol=1e-5)
    assert len({tuple(row) for row in (output.mixture > 0).tolist()}) > 1


def test_a_projector_with_a_path_past_it_adds_its_layers_to_the_experts_own_part():
    from mediator_cli.moe.heterogeneous.configuration import ProjectorConfig
    from mediator_cli.moe.heterogeneous.projector import Projector

    x = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    narrow, wide = (Projector(ProjectorConfig(), sizes, 4) for sizes in ((10, 5), (5, 10)))
    torch.testing.assert_close(narrow(x), x[..., 4:9] + x @ narrow.layers[0].weight.T + narrow.layers[0].bias)
    y = x[..., :5]
    padded = torch.cat([torch.zeros(2, 3, 4), y, torch.zeros(2, 3, 1)], dim=-1)
    torch.testing.assert_close(wide(y), padded + y @ wide.layers[0].weight.T + wide.layers[0].bias)


def test_only_the_chosen_experts_run(ids):
    model = make(top_k=1)
    read: dict[int, int] = {}
    for number, expert in enumerate(model.experts):
        expert.body.register_forward_hook(
            lambda _, __, kwargs, ___, n=number: read.update({n: len(kwargs["inputs_embeds"])}), with_kwargs=True
        )
    chosen = model(ids).mixture.argmax(dim=1)
    assert read == {n: count for n, count in enumerate(np.bincount(chosen, minlength=3).tolist()) if count}
    assert len(read) > 1


def batch_of(ids: torch.Tensor, lengths=(7, 3, 5, 1, 6)) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(7)[None] >= 7 - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask.long()


@pytest.mark.parametrize("top_k", [1, 3])
def test_greedy_answers_are_the_same_with_and_without_cache_alone_and_in_a_batch(ids, top_k):
    model = make(top_k=top_k)
    padded, mask = batch_of(ids)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(padded, attention_mask=mask, **options)[:, 7:]
    assert torch.equal(together, model.generate(padded, attention_mask=mask, use_cache=False, **options)[:, 7:])
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        alone = padded[row : row + 1, 7 - length :]
        found = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(found[0, length:], together[row])


def test_beams_keep_the_mixture_of_their_prompt(model, ids):
    padded, mask = batch_of(ids)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = [model.generate(padded, attention_mask=mask, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*found)


def test_two_passes_with_a_cache_give_the_logits_of_one(model, ids):
    first = model(ids[:, :4], use_cache=True)
    second = model(ids[:, 4:], past_key_values=first.past_key_values)
    whole = model(ids, mixture=first.mixture)
    assert first.past_key_values.get_seq_length() == 7
    torch.testing.assert_close(second.logits, whole.logits[:, 4:], rtol=0, atol=1e-5)


def test_a_reordered_cache_is_that_of_reordered_rows(model, ids):
    order = torch.tensor([3, 3, 0, 4, 1])
    cache = model(ids[:, :4], use_cache=True).past_key_values
    cache.reorder_cache(order)
    expected = model(ids[order], mixture=cache.mixture).logits[:, 4:]
    found = model(ids[order][:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_answer_does_not_choose_who_answers(model, ids):
    labels = ids.clone()
    labels[:, :4] = -100
    scored = model(ids, labels=labels)
    prompt = model(ids[:, :4])
    torch.testing.assert_close(scored.mixture, prompt.mixture)
    logits = model(ids, mixture=prompt.mixture).logits[:, 3:-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 4:].flatten())
    torch.testing.assert_close(scored.loss, expected)
    by_mask = model(ids, prompt_mask=torch.arange(7).expand(5, 7) < 4)
    torch.testing.assert_close(by_mask.mixture, prompt.mixture)


def test_the_balance_loss_is_added_with_its_factor(ids):
    labels = ids.masked_fill(torch.arange(7) < 4, -100)
    plain, balanced = make(), make(router_aux_loss_coef=0.5)
    without, with_it = plain(ids, labels=labels), balanced(ids, labels=labels)
    torch.testing.assert_close(with_it.loss, without.loss + 0.5 * without.aux_loss)
    with_it.loss.backward()
    assert balanced.router.weight.grad.abs().max() > 0
    assert all(torch.isfinite(p.grad).all() for p in balanced.parameters() if p.grad is not None)


def test_routing_formulas():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]])
    mixture = mixture_of(logits, 2)
    e = np.e
    torch.testing.assert_close(mixture, torch.tensor([[0, e / (1 + e), 1 / (1 + e)], [0.5, 0.5, 0]]).float())
    torch.testing.assert_close(mixture_of(logits, 9), logits.softmax(dim=1))
    even = torch.eye(4)
    assert balance_loss(torch.zeros(4, 4), even) == pytest.approx(1)
    assert balance_loss(100 * even[:1].expand(6, 4), even[:1].expand(6, 4)) == pytest.approx(4)
    states = torch.arange(12.0).reshape(1, 4, 3)
    marked = torch.tensor([[0, 1, 1, 0]])
    torch.testing.assert_close(prompt_mean(states, marked), torch.tensor([[4.5, 5.5, 6.5]]))
    torch.testing.assert_close(prompt_mean(states, 0 * marked), torch.zeros(1, 3))
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    found = before_labels(mask, torch.tensor([[-100, -100, 5, -100], [4, 5, 6, 7]]))
    assert found.tolist() == [[False, True, False, False], [True] * 4]


def test_a_saved_model_comes_back(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {name: found for name, found in info.items() if found} == {}
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    assert again.config.expert_names == ("e0", "e1", "e2")
    tied = make(tie_word_embeddings=True)
    assert tied.head.weight is tied.embed.weight


def test_64_experts():
    model = make(["llama"] * 64, top_k=64)
    with torch.no_grad():
        mixture = model(torch.tensor([[3, 4]])).mixture
    assert mixture.shape == (1, 64)
    assert mixture.sum() == pytest.approx(1)


def test_what_it_cannot_do_is_refused(model, ids):
    with pytest.raises(ValueError, match=r"attention_mask is \[rows, tokens\]"):
        model(ids, attention_mask=torch.ones(5, 1, 7, 7))
    with pytest.raises(ValueError, match="those of an earlier pass of this model"):
        model(ids, past_key_values=AutoModelForCausalLM.from_config(model.config.expert_config(0))(ids).past_key_values)
    with pytest.raises(ValueError, match="cache_implementation static"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)


def test_scores_of_answers_are_routed_by_their_prompts(model):
    from mediator_cli.evaluate.forward import make_job, score_alike
    from mediator_cli.evaluate.layout import Query

    queries = [Query((5, 9, 3, 8), (7, 11, 4)), Query((6, 4), (12,)), Query((21, 4, 17, 9, 3, 28), (9, 9))]
    found = dict(score_alike(make_job(model, queries, [1]), [0, 1, 2]))
    for number, query in enumerate(queries):
        with torch.no_grad():
            mixture = model(torch.tensor([query.prompt])).mixture
            ids = torch.tensor([[*query.prompt, *query.answer]])
            each = model(ids, mixture=mixture).logits[0].log_softmax(dim=-1)[len(query.prompt) - 1 :]
        wanted = [*query.answer, 1]
        expected = sum(each[place, token].item() for place, token in enumerate(wanted))
        assert found[number].log_prob == pytest.approx(expected, abs=1e-4)
