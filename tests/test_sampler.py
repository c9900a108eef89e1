"""common.sample: what it draws, where it stops, and what it does not depend on."""

import math
from collections import Counter

import pytest
import torch
import transformers
from conftest import CPU, TRAIN, VOCAB, ragged_ids

import common
import ppo

LENGTHS = (
    (1, 1),
    (17, 1),
    (5, 1),
    (30, 1),
    (2, 1),
)  # of prompts; 30 is far over Gemma 2's window of 8


def prompts_of(seed, lengths=LENGTHS):
    return ragged_ids(seed, lengths)[0]


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def draw(
    model, prompts, generations=2, limit=12, temperature=0.7, stop_ids=(1, 5), seed=1, **options
):
    return common.sample(
        model, prompts, generations, limit, temperature, list(stop_ids), seeded(seed), **options
    )


@torch.no_grad()
def next_probs(model, prompt, temperature):
    """The exact distribution of the token after one prompt, by the model's own forward."""
    logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    return (logits / temperature).softmax(-1)


def chi_square(tokens, probs):
    """Pearson's statistic less its expectation, in standard deviations; rare tokens are counted as one."""
    counts, cells = Counter(tokens), []
    rare = [i for i, p in enumerate(probs) if p * len(tokens) < 5]
    for group in [[i] for i in range(len(probs)) if i not in rare] + ([rare] if rare else []):
        expected = len(tokens) * sum(probs[i].item() for i in group)
        cells.append((sum(counts[i] for i in group) - expected) ** 2 / expected)
    return (sum(cells) - (len(cells) - 1)) / math.sqrt(2 * (len(cells) - 1))


def greedy_by_hand(model, prompt, limit, stop_ids):
    """One row, no cache, no padding: the whole sequence again for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit and (len(ids) == len(prompt) or ids[-1] not in stop_ids):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_training_forward(temperature, sampled):
    """Left padding, positions, cache, shared prompts and rows that leave early: all agree with one forward
    of the right-padded whole."""
    prompts = prompts_of(1)
    completions, logps = draw(sampled, prompts, 3, 14, temperature, stop_ids=range(1, 8))
    assert len(set(map(len, completions))) > 3
    batch = common.completion_batch([p for p in prompts for _ in range(3)], completions, CPU)
    mask = batch.completion_mask[:, 1:]
    with torch.no_grad():
        inputs = (sampled, batch.input_ids, batch.attention_mask, mask, temperature)
        expected, _ = ppo.token_logprobs(*inputs)
    ours = torch.tensor([x for row in logps for x in row])
    assert [len(row) for row in logps] == [len(row) for row in completions]
    torch.testing.assert_close(ours, expected[mask.bool()], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_from_the_whole_distribution(temperature, tiny_llama, tmp_path):
    """Settings in the checkpoint's generation config (top_k, top_p, temperature, penalties) play no part."""
    narrow = dict(
        do_sample=True, top_k=2, top_p=0.1, temperature=0.2, repetition_penalty=5.0, min_p=0.5
    )
    saved = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama.name_or_path)
    saved.generation_config = transformers.GenerationConfig(
        **narrow, suppress_tokens=[7, 8], eos_token_id=1
    )
    saved.save_pretrained(tmp_path)
    model = common.load_policy(str(tmp_path), CPU, train=TRAIN)
    assert model.generation_config.top_k == 2
    prompt, n = prompts_of(2)[1], 4000
    completions, logps = draw(model, [prompt], n, 1, temperature)
    tokens, probs = [c[0] for c in completions], next_probs(model, prompt, temperature)
    assert len(set(tokens)) > 30
    assert chi_square(tokens, probs) < 4
    assert (
        chi_square(tokens, next_probs(model, prompt, 0.85)) > 10
    )  # a wrong temperature would show
    exact = torch.tensor([probs[t].log() for t in tokens])
    torch.testing.assert_close(torch.tensor(logps)[:, 0], exact.float(), rtol=1e-5, atol=1e-5)


def test_later_tokens_follow_their_distribution(tiny_qwen2):
    """The second token too, given the first: noise of one step tells nothing of the next."""
    prompt = prompts_of(3)[2]
    completions, _ = draw(tiny_qwen2, [prompt], 6000, 2, 0.7, stop_ids=[])
    (first, n), *_ = Counter(c[0] for c in completions).most_common(1)
    assert n > 300
    seconds = [c[1] for c in completions if c[0] == first]
    assert chi_square(seconds, next_probs(tiny_qwen2, prompt + [first], 0.7)) < 4


def test_generations_belong_to_their_prompt(policy):
    """G generations of a prompt stand side by side, in the order of the prompts, and differ."""
    prompts, generations = prompts_of(4), 1000
    completions, _ = draw(policy, prompts, generations, 1, stop_ids=[])
    probs = [next_probs(policy, prompt, 0.7) for prompt in prompts]
    for i in range(len(prompts)):
        tokens = [c[0] for c in completions[i * generations : (i + 1) * generations]]
        fits = [chi_square(tokens, p) for p in probs]
        assert fits[i] < 4 and all(fit > 12 for j, fit in enumerate(fits) if j != i)
        assert len(set(tokens)) > 3


def test_every_stop_id_ends_a_completion(policy):
    """It is kept as the last token and nothing follows; what has none has max_new_tokens. Up to there the
    tokens are those of a run that never stops, so rows that leave do not disturb the others."""
    prompts, limit = prompts_of(5), 12
    endless, endless_logps = draw(policy, prompts, 20, limit, 1.0, [])
    stop_ids = [token for token, _ in Counter(sum(endless, [])).most_common(12)[7:]]
    completions, logps = draw(policy, prompts, 20, limit, 1.0, stop_ids)
    assert all(len(row) == limit for row in endless)
    for ours, whole, ours_logps, whole_logps in zip(
        completions, endless, logps, endless_logps, strict=True
    ):
        at = next((t + 1 for t, token in enumerate(whole) if token in stop_ids), limit)
        assert ours == whole[:at]
        assert ours_logps == pytest.approx(whole_logps[:at], rel=1e-5, abs=1e-5)
    assert {c[-1] for c in completions} >= set(stop_ids)
    assert any(c[-1] not in stop_ids for c in completions) and min(map(len, completions)) == 1


def test_sampling_ends_when_all_rows_have_ended(tiny_llama):
    """Not one forward more than the longest completion needs, and rows that have ended leave the batch."""
    rows = []
    hook = tiny_llama.register_forward_hook(
        lambda model, args, output: rows.append(len(output.logits))
    )
    completions, _ = draw(tiny_llama, prompts_of(6), 8, 40, 1.0, range(16))
    hook.remove()
    assert len(rows) == max(map(len, completions)) < 40
    for t in range(1, len(rows)):
        assert sum(len(c) > t for c in completions) <= rows[t] <= 40
    assert rows[0] == 5 and rows[1] > 20 and rows[-1] < 10


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_completions_have_at_most_max_new_tokens(limit, tiny_llama):
    """And at least one; every id is in the vocabulary; log-probs are not above 0."""
    completions, logps = draw(tiny_llama, prompts_of(7), 4, limit)
    assert len(completions) == len(logps) == 4 * len(LENGTHS)
    assert max(map(len, completions)) == limit and min(map(len, completions)) >= 1
    assert all(0 <= token < VOCAB for row in completions for token in row)
    assert all(x <= 0 for row in logps for x in row)


def forwards(model, call):
    """Run call() -> its result, and how many rows each forward of the model had."""
    rows = []
    hook = model.register_forward_hook(lambda model, args, output: rows.append(len(output.logits)))
    result = call()
    hook.remove()
    return result, rows


def same(ours, theirs):
    """The same tokens, and log-probs up to rounding."""
    assert ours[0] == theirs[0]
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=2e-5)


@pytest.mark.parametrize("stop_ids", [(), (1, 5), range(1, 16)])
def test_fast_and_plain_give_the_same_tokens(stop_ids, sampled, monkeypatch):
    """Storage for the whole wave or transformers' growing cache; finished rows dropped at once, late or
    never; waves of one prompt, of some, or all at once. Windowed layers take the growing cache always."""
    prompts, whole = prompts_of(8), dict(limit=20, stop_ids=stop_ids)
    plain, rows = forwards(sampled, lambda: draw(sampled, prompts, 4, plain=True, **whole))
    assert len(stop_ids) < 9 or rows[-1] < 10 < rows[1]  # rows have left on the way
    same(draw(sampled, prompts, 4, **whole), plain)
    for memory in (1, 100_000, 200_000, 300_000):
        same(draw(sampled, prompts, 4, memory=memory, **whole), plain)
    for every in (3, 16, 100):
        monkeypatch.setitem(common.CHECK_EVERY, "cpu", every)
        ours, late = forwards(sampled, lambda: draw(sampled, prompts, 4, **whole))
        same(ours, plain)
        assert len(rows) <= len(late) < len(rows) + every


def test_the_growing_cache_is_taken_for_windows_only_and_said_once(sampled, capsys, monkeypatch):
    """GPT-2's eager attention would take it too."""
    written = []
    update = common.PreallocatedLayer.update
    spy = lambda layer, *args, **kwargs: written.append(layer) or update(layer, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(common.PreallocatedLayer, "update", spy)
    common.say_once.cache_clear()
    for _ in range(3):
        draw(sampled, prompts_of(8), 2, 5)
    windowed = "gemma" in sampled.config.model_type
    assert (written == []) == windowed
    assert capsys.readouterr().out.count("growing cache") == windowed
    monkeypatch.setattr(sampled.config, "_attn_implementation", "eager")
    written.clear()
    draw(sampled, prompts_of(8), 2, 5)
    assert not written


def test_steps_write_into_one_storage(tiny_llama, monkeypatch):
    """Nothing is copied from step to step: the same memory from first to last, dropped rows or not."""
    places = set()
    update = common.PreallocatedLayer.update

    def spy(layer, *args, **kwargs):
        keys, values = update(layer, *args, **kwargs)
        places.update((keys.data_ptr(), values.data_ptr()))
        return keys, values

    monkeypatch.setattr(common.PreallocatedLayer, "update", spy)
    _, rows = forwards(tiny_llama, lambda: draw(tiny_llama, prompts_of(6), 8, 40, 1.0, range(16)))
    assert len(set(rows[1:])) > 2 and len(places) == 2 * tiny_llama.config.num_hidden_layers


def test_the_host_asks_the_device_nothing_within_a_step(tiny_llama, monkeypatch):
    """Every operator that would make the host wait for a GPU, counted on the CPU: as many in 30 steps as in
    15, but for the checks."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Questions(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            waits = (
                "_local_scalar_dense",
                "nonzero",
                "is_nonzero",
                "masked_select",
                "unique",
                "equal.",
            )
            self.count = getattr(self, "count", 0) + any(name in str(function) for name in waits)
            return function(*args, **(kwargs or {}))

    def count(limit, every, prompts):
        monkeypatch.setitem(common.CHECK_EVERY, "cpu", every)
        with Questions() as questions:
            draw(tiny_llama, prompts, 2, limit, stop_ids=[])
        return questions.count

    for prompts in (prompts_of(8), [[1, 2, 3], [4, 5, 6]]):  # with left padding and without
        assert count(30, 100, prompts) == count(15, 100, prompts)
        assert count(30, 10, prompts) == count(15, 100, prompts) + 2  # one question a check


def test_memory_bounds_the_rows_of_a_wave(tiny_llama):
    """Keys and values (2 layers, 2 heads of 8, float32), the prefill of a hidden size of 32, shared by two
    rows, and the draw's copies of the logits, 32 bytes a token of the vocabulary."""
    prompts, row = prompts_of(8), 4 * (2 * 2 * (2 * 8) * (30 + 12) + 16 * 32 * 30 / 2) + 32 * VOCAB
    for memory, most in ((row, 2), (4 * row, 4), (7 * row, 6), (10 * row, 10)):
        _, rows = forwards(tiny_llama, lambda: draw(tiny_llama, prompts, 2, memory=memory))
        assert max(rows) == most
    _, rows = forwards(tiny_llama, lambda: draw(tiny_llama, prompts, 300, 2, stop_ids=[]))
    assert max(rows) == 300  # never more than 512, but for one prompt's generations


def test_storage_has_the_dtype_of_the_computation(tiny_qwen2, monkeypatch):
    """Rotary embeddings give float32 keys under autocast, and attention takes bfloat16: they are kept so."""
    kinds, update = set(), common.PreallocatedLayer.update

    def spy(layer, *args, **kwargs):
        kinds.add(layer.stored[0].dtype)
        return update(layer, *args, **kwargs)

    monkeypatch.setattr(common.PreallocatedLayer, "update", spy)
    draw(tiny_qwen2, prompts_of(8), 2)
    assert kinds == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        kinds.clear()
        fast = draw(tiny_qwen2, prompts_of(8), 4, stop_ids=())
        plain = draw(tiny_qwen2, prompts_of(8), 4, stop_ids=(), plain=True)
    assert kinds == {torch.bfloat16}
    assert fast == plain


def test_other_rows_change_nothing(policy):
    """The first rows' tokens are the same whatever prompts, longer ones too, come after them."""
    prompts = prompts_of(9)
    whole, _ = draw(policy, prompts, 2)
    for n in (1, 2, 3):
        assert draw(policy, prompts[:n], 2)[0] == whole[: 2 * n]
    other = prompts_of(10)
    assert draw(policy, prompts[:2] + other[2:], 2)[0][:4] == whole[:4]


def test_the_seed_alone_decides(tiny_llama):
    """Equal seeds give equal tokens whatever the global generator holds, and do not move it."""
    prompts = prompts_of(11)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again = draw(tiny_llama, prompts, seed=3), None
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = draw(tiny_llama, prompts, seed=3), draw(tiny_llama, prompts, seed=4)
    assert first == again and first[0] != other[0]


def test_greedy_is_the_argmax_of_full_forwards(policy):
    """temperature 0; log-probs are then at temperature 1; generations are alike."""
    prompts, stop_ids = prompts_of(12), [1, 2, 3, 4, 5, 6]
    completions, logps = draw(policy, prompts, 2, 10, 0.0, stop_ids)
    for i, prompt in enumerate(prompts):
        expected = greedy_by_hand(policy, prompt, 10, stop_ids)
        assert completions[2 * i] == completions[2 * i + 1] == expected
        first = next_probs(policy, prompt, 1.0).max().log().item()
        assert logps[2 * i][0] == pytest.approx(first, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored(training, tiny_gpt2):
    """Sampling runs in eval mode and leaves the model as it was."""
    modes = []
    hook = tiny_gpt2.register_forward_hook(lambda model, *_: modes.append(model.training))
    tiny_gpt2.train(training)
    draw(tiny_gpt2, prompts_of(13))
    hook.remove()
    assert not any(modes) and modes
    assert all(module.training == training for module in tiny_gpt2.modules())
    tiny_gpt2.train()


def test_no_graph_is_kept(tiny_llama):
    """A model in training is sampled from without gradients."""
    grads = []
    hook = tiny_llama.register_forward_hook(
        lambda model, args, output: grads.append(output.logits.requires_grad)
    )
    draw(tiny_llama, prompts_of(14), limit=3)
    hook.remove()
    assert grads and not any(grads)


def test_gradient_checkpointing_does_not_matter(policy):
    """It would switch off the cache in training mode."""
    args = type("Args", (), dict(seed=1, gradient_checkpointing=True))
    checkpointed = common.load_policy(policy.name_or_path, CPU, train=args)
    lengths = []
    hook = checkpointed.register_forward_hook(
        lambda model, args, kwargs, output: lengths.append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    prompts = prompts_of(15)
    assert draw(checkpointed, prompts) == draw(policy, prompts)
    hook.remove()
    assert lengths[0] == 30 and set(lengths[1:]) == {1}


@pytest.mark.parametrize("pad_id", [0, 1])
def test_pad_may_equal_eos(pad_id, tiny_llama, tmp_path):
    """EOS inside prompts, 0 (which pads on the left) as a stop, and both as PAD in the batch: nothing is
    masked that was drawn."""
    tokenizer = common.tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert common.load_tokenizer(str(tmp_path)).pad_token_id == tokenizer.eos_token_id == 1
    prompts = [[0], [1, 1, 7, 0, 0], [9, 1], [0, 0, 0, 30, 31, 32, 33]]
    completions, logps = draw(tiny_llama, prompts, 8, 10, 1.0, stop_ids=[0, 1, 2, 3])
    assert {0, 1} <= {c[-1] for c in completions} and not any(
        {0, 1} & set(c[:-1]) for c in completions
    )
    batch = common.completion_batch([p for p in prompts for _ in range(8)], completions, CPU)
    batch.input_ids[batch.attention_mask == 0] = pad_id
    mask = batch.completion_mask[:, 1:]
    assert mask.sum(1).tolist() == [len(c) for c in completions]
    for i, completion in enumerate(completions):
        assert batch.input_ids[i, 1:][mask[i].bool()].tolist() == completion
    with torch.no_grad():
        expected, _ = ppo.token_logprobs(tiny_llama, batch.input_ids, batch.attention_mask, mask)
    ours = torch.tensor([x for row in logps for x in row])
    torch.testing.assert_close(ours, expected[mask.bool()], rtol=1e-5, atol=2e-5)


def test_a_token_of_probability_zero_is_never_drawn(tiny_llama, monkeypatch):
    """Nor at either end of the vocabulary, where a cumulative sum could slip; log-probs stay finite."""
    forward, allowed = tiny_llama.forward, [20, 21, 40]

    def masked(*args, **kwargs):
        output = forward(*args, **kwargs)
        banned = torch.ones(VOCAB, dtype=torch.bool)
        banned[allowed] = False
        output.logits = output.logits.masked_fill(banned, -math.inf)
        return output

    monkeypatch.setattr(tiny_llama, "forward", masked)
    completions, logps = draw(tiny_llama, prompts_of(16), 400, 2)
    assert {token for row in completions for token in row} == set(allowed)
    assert all(math.isfinite(x) for row in logps for x in row)
    noise = torch.tensor(
        [[0.0], [1 - 2**-53], [0.5]], dtype=torch.float64
    )  # the ends of what rand gives
    ends = [tokens for tokens, _ in common._sample_wave(tiny_llama, [[3]], 1.0, [1], noise, False)]
    assert ends[0] == [20] and ends[1] == [40] and ends[2][0] in allowed
