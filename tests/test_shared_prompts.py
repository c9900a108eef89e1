"""Rows with one prompt share its forward and backward pass: the numbers of rows that stand alone."""

import contextlib

import pytest
import torch
import transformers
from conftest import CPU, SHAPE, TRAIN
from test_resume import run
from test_scripts import chain, metrics, refused  # noqa: F401 (a fixture)

import common

WINDOWED = "Gemma"
PROMPTS, GROUPS = (2, 9, 5), ((3, 7, 1, 4), (1, 2, 12, 6), (5, 5, 1, 9))


def share_of_vowels(prompts, completions, rows):
    """A reward that untrained models get different amounts of."""
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in completions]


def group_batch(seed=1, prompts=PROMPTS, groups=GROUPS):
    """Groups of completions of ragged lengths, in an order in which no group stands together."""
    draw = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(2, 60, (n,), generator=draw).tolist()

    pairs = [(p, ids(n)) for p, group in zip(map(ids, prompts), groups) for n in group]
    pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=draw).tolist()]
    return common.completion_batch(*zip(*pairs), CPU)


@contextlib.contextmanager
def counted_tokens(model):
    """Tokens that go through the model's embedding."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].numel())
    )
    yield seen
    hook.remove()


def alone(model, input_ids, attention_mask, mask):
    """Each row by itself, without padding, cache or masks -> (N, H)."""
    rows = []
    for ids, real, wanted in zip(input_ids, attention_mask, mask):
        n = int(real.sum())
        rows.append(
            model.base_model(ids[None, :n], use_cache=False).last_hidden_state[0, :-1][
                wanted[: n - 1]
            ]
        )
    return torch.cat(rows)


def with_gradient(function, model, batch, mask):
    """(N, H), and the gradient of a random function of it in every weight."""
    model.zero_grad()
    hidden = function(model, batch.input_ids, batch.attention_mask, mask)
    hidden = hidden[:, :-1][mask] if hidden.dim() == 3 else hidden
    factors = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    (hidden * factors).sum().backward()
    grads = torch.cat([
        p.grad.flatten() for p in model.base_model.parameters() if p.grad is not None
    ])
    model.zero_grad()
    return hidden.detach(), grads


@pytest.mark.parametrize("left_out", ["nothing", "a row", "ends"])
def test_values_and_gradients_are_those_of_rows_alone(sampled, left_out, monkeypatch):
    """Seven architectures, groups in any order, a row that trains on nothing, masks that end early."""
    monkeypatch.setattr(common, "SMALL_BATCH", 0)
    batch = group_batch()
    mask = batch.completion_mask[:, 1:].bool()
    if left_out == "a row":
        mask[4] = False
    if left_out == "ends":
        last = torch.tensor(batch.lengths)[:, None] - 2 == torch.arange(mask.shape[1])
        mask &= ~last | (mask.sum(1, keepdim=True) == 1)
    expected, expected_grads = with_gradient(alone, sampled, batch, mask)
    with counted_tokens(sampled) as tokens:
        found, found_grads = with_gradient(common.hidden_states, sampled, batch, mask)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    assert (found_grads - expected_grads).norm() < 1e-5 * expected_grads.norm()
    windowed = WINDOWED in type(sampled).__name__
    # three prompts of at most 9 tokens (and the first token of the row that trains on nothing), and what
    # comes after the first of at most 12 completion tokens
    shared = [(4 if left_out == "a row" else 3) * 9, 12 * (10 if left_out == "ends" else 11)]
    assert tokens == ([batch.input_ids.numel()] if windowed else shared)


def test_prompts_are_shared_where_it_spares_a_fifth(tiny_llama, monkeypatch):
    """Not for rows of their own prompts, nor few tokens, nor with gradient checkpointing."""

    def shares(batch):
        mask = batch.completion_mask[:, 1:].bool()
        with counted_tokens(tiny_llama) as tokens, torch.no_grad():
            common.hidden_states(tiny_llama, batch.input_ids, batch.attention_mask, mask)
        return len(tokens) == 2

    assert not shares(group_batch())  # 252 tokens
    monkeypatch.setattr(common, "SMALL_BATCH", 0)
    assert shares(group_batch())
    assert not shares(
        group_batch(prompts=PROMPTS * 4, groups=[(n,) for group in GROUPS for n in group])
    )
    assert shares(group_batch(prompts=(8,), groups=((9, 9),)))  # a pair: 8 + 2 * 8 of 34
    assert not shares(group_batch(prompts=(2,), groups=((9, 9),)))  # 2 + 2 * 8 of 22
    assert not shares(group_batch(prompts=(8,), groups=((1, 1),)))  # nothing but the prompt is read
    tiny_llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert not shares(group_batch())
    tiny_llama.gradient_checkpointing_disable()
    monkeypatch.setattr(tiny_llama.config, "rope_parameters", {"rope_type": "dynamic"})
    assert not shares(group_batch())


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo", "dpo"])
def test_a_run_is_the_same_with_and_without(name, chain, tmp_path, monkeypatch):  # noqa: F811
    """Whole steps, through main; and prompts really were shared."""
    found, calls = {}, []
    for small in (10**9, 0):
        monkeypatch.setattr(common, "SMALL_BATCH", small)
        select = torch.Tensor.index_select
        monkeypatch.setattr(
            torch.Tensor, "index_select", lambda *x: calls.append(small) or select(*x)
        )
        more = (
            {} if name == "dpo" else dict(num_generations=4, reward=f"{__file__}:share_of_vowels")
        )
        run(
            name,
            chain,
            tmp_path / str(small),
            micro_batch_tokens=10**6,
            eval_every=0,
            steps=2,
            **more,
        )
        monkeypatch.undo()
        found[small] = metrics(tmp_path / str(small))
    assert set(calls) == {0}
    for with_, without in zip(found[0], found[10**9]):
        for key in ("loss", "grad_norm", "kl", "entropy", "accuracy", "margin", "loss/value"):
            if key in without:
                assert with_[key] == pytest.approx(without[key], rel=1e-3, abs=1e-5), key


def test_models_that_count_positions_their_own_way_are_refused(tmp_path, capsys):
    """BART's decoder takes them from the width of the cache: prompts could not be padded on the left."""
    torch.manual_seed(0)
    shape = dict(
        d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, vocab_size=64
    )
    config = transformers.BartConfig(
        **shape, is_decoder=True, max_position_embeddings=64, init_std=0.3
    )
    transformers.BartForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        common.load_policy(str(tmp_path), CPU)
    refused(capsys, "BartForCausalLM", "counts positions")


def test_jitter_is_off(tmp_path):
    """Experts that are drawn at random in training would give two forwards different log-probs."""
    shape = dict(vocab_size=64, num_local_experts=2, num_key_value_heads=2, router_jitter_noise=0.3)
    config = transformers.MixtralConfig(**SHAPE | shape, sliding_window=None)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, ids = common.load_policy(str(tmp_path), CPU, train=TRAIN), torch.arange(5, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
