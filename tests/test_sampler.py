"""common.sample: what it draws, where it stops, and what it does not depend on."""

import functools
import math
from collections import Counter

import pytest
import torch
import transformers
from conftest import CPU, VOCAB, ragged_ids

import common
import ppo
import sft

# of prompts; 30 is far over Gemma 2's window of 8
LENGTHS = ((1, 1), (17, 1), (5, 1), (30, 1), (2, 1))


def prompts_of(seed, lengths=LENGTHS):
    return ragged_ids(seed, lengths)[0]


def complete(model, prompts, generations=2, limit=12, temperature=0.7, *, eos_ids=(1, 5), **more):
    """common.sample with a seed instead of a generator."""
    rng = torch.Generator().manual_seed(more.pop("seed", 1))
    return common.sample(
        model,
        prompts,
        num_generations=generations,
        max_new_tokens=limit,
        temperature=temperature,
        eos_ids=list(eos_ids),
        rng=rng,
        **more,
    )


@pytest.fixture
def complete_with_logprobs(monkeypatch):
    """complete(...) -> completions, and the log-probs that their tokens had when they were drawn.

    Every row and step has a random number of its own, which tells where a drawn token belongs."""

    def run(model, prompts, generations, limit, temperature, *, eos_ids, seed=1):
        logprob_of = {}
        draw = common.draw

        def spy(logits, temperature, noise):
            tokens = draw(logits, temperature, noise)
            logps = (logits / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            logprob_of.update(zip(noise.tolist(), logps.tolist(), strict=True))
            return tokens

        monkeypatch.setattr(common, "draw", spy)
        completions = complete(
            model, prompts, generations, limit, temperature, eos_ids=eos_ids, seed=seed
        )
        monkeypatch.setattr(common, "draw", draw)
        rng = torch.Generator().manual_seed(seed)
        noise = torch.rand(len(completions), limit, generator=rng, dtype=torch.float64).tolist()
        logprobs = [
            [logprob_of[noise[row][t]] for t in range(len(ids))]
            for row, ids in enumerate(completions)
        ]
        return completions, logprobs

    return run


def check_training_forward(model, prompts, completions, logprobs, temperature):
    """One forward of the right-padded whole gives the same log-probs."""
    generations = len(completions) // len(prompts)
    repeated = [ids for ids in prompts for _ in range(generations)]
    batch = ppo.completion_batch(repeated, completions, CPU)
    with torch.no_grad():
        expected, _ = ppo.token_logprobs_and_entropy(model, batch, temperature)
    ours = torch.tensor([x for row in logprobs for x in row])
    torch.testing.assert_close(ours, expected[batch["mask"].bool()], rtol=1e-5, atol=2e-5)


@torch.no_grad()
def next_probs(model, prompt, temperature):
    """The exact distribution of the token after one prompt, by the model's own forward."""
    logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    return (logits / temperature).softmax(-1)


def chi_square(tokens, probs):
    """Pearson's statistic less its expectation, in standard deviations; rare tokens count as
    one."""
    counts = Counter(tokens)
    rare = [i for i, p in enumerate(probs) if p * len(tokens) < 5]
    groups = [[i] for i in range(len(probs)) if i not in rare]
    if rare:
        groups.append(rare)
    statistic = 0.0
    for group in groups:
        expected = len(tokens) * sum(probs[i].item() for i in group)
        statistic += (sum(counts[i] for i in group) - expected) ** 2 / expected
    return (statistic - (len(groups) - 1)) / math.sqrt(2 * (len(groups) - 1))


@torch.no_grad()
def greedy_by_hand(model, prompt, limit, eos_ids):
    """One row, no cache, no padding: the whole sequence again for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit and (len(ids) == len(prompt) or ids[-1] not in eos_ids):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def forwards(model, call):
    """Run call() -> its result, and the shape of the ids that each forward of the model had."""
    shapes = []
    hook = model.register_forward_hook(
        lambda model, args, kwargs, output: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    result = call()
    hook.remove()
    return result, shapes


# ---------------------------------------------------------------- what it draws
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_training_forward(temperature, sampled, complete_with_logprobs):
    """Left padding, positions, cache, shared prompts and rows that leave early: all agree with one
    forward of the right-padded whole."""
    prompts = prompts_of(1)
    completions, logprobs = complete_with_logprobs(
        sampled, prompts, 3, 14, temperature, eos_ids=range(1, 8)
    )
    assert len(set(map(len, completions))) > 3
    check_training_forward(sampled, prompts, completions, logprobs, temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_from_the_whole_distribution(temperature, tiny_llama, tmp_path):
    """Settings in the checkpoint's generation config (top_k, temperature, penalties) play no
    part."""
    saved = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama.name_or_path)
    saved.generation_config = transformers.GenerationConfig(
        do_sample=True,
        top_k=2,
        top_p=0.1,
        min_p=0.5,
        temperature=0.2,
        repetition_penalty=5.0,
        suppress_tokens=[7, 8],
        eos_token_id=1,
    )
    saved.save_pretrained(tmp_path)
    model = common.load_policy(str(tmp_path), CPU)
    assert model.generation_config.top_k == 2
    prompt = prompts_of(2)[1]
    tokens = [ids[0] for ids in complete(model, [prompt], 4000, 1, temperature)]
    assert len(set(tokens)) > 30
    assert chi_square(tokens, next_probs(model, prompt, temperature)) < 4
    # a wrong temperature would show
    assert chi_square(tokens, next_probs(model, prompt, 0.85)) > 10


def test_later_tokens_follow_their_distribution(tiny_qwen2):
    """The second token too, given the first: noise of one step tells nothing of the next."""
    prompt = prompts_of(3)[2]
    completions = complete(tiny_qwen2, [prompt], 6000, 2, 0.7, eos_ids=[])
    [(first, n)] = Counter(ids[0] for ids in completions).most_common(1)
    assert n > 300
    seconds = [ids[1] for ids in completions if ids[0] == first]
    assert chi_square(seconds, next_probs(tiny_qwen2, prompt + [first], 0.7)) < 4


def test_generations_belong_to_their_prompt(policy):
    """G generations of a prompt stand side by side, in the order of the prompts, and differ."""
    prompts = prompts_of(4)
    generations = 1000
    completions = complete(policy, prompts, generations, 1, eos_ids=[])
    probs = [next_probs(policy, prompt, 0.7) for prompt in prompts]
    for i in range(len(prompts)):
        tokens = [ids[0] for ids in completions[i * generations : (i + 1) * generations]]
        fits = [chi_square(tokens, p) for p in probs]
        assert fits[i] < 4 and all(fit > 12 for j, fit in enumerate(fits) if j != i)
        assert len(set(tokens)) > 3


def test_greedy_is_the_argmax_of_full_forwards(policy):
    """temperature 0; generations are alike."""
    prompts = prompts_of(12)
    eos_ids = [1, 2, 3, 4, 5, 6]
    completions = complete(policy, prompts, 2, 10, 0.0, eos_ids=eos_ids)
    for i, prompt in enumerate(prompts):
        expected = greedy_by_hand(policy, prompt, 10, eos_ids)
        assert completions[2 * i] == completions[2 * i + 1] == expected


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_draw_inverts_the_distribution_function(temperature):
    """Token i is drawn by the numbers from p_0 + ... + p_i-1 up to p_0 + ... + p_i: here all of a
    fine grid, so that the share of each token is its probability, to one cell of the grid."""
    probs = torch.tensor([0.5, 0.0, 0.125, 0.375], dtype=torch.float64)
    logits = temperature * probs.log()
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = common.draw(logits.float().expand(1000, 4), temperature, grid)
    assert tokens.tolist() == sorted(tokens.tolist())
    assert torch.bincount(tokens, minlength=4).tolist() == [500, 0, 125, 375]


def test_a_token_of_probability_zero_is_never_drawn(tiny_llama, monkeypatch):
    """Nor at either end of the vocabulary, where a cumulative sum could slip."""
    allowed = [20, 21, 40]
    forward = tiny_llama.forward

    def masked(*args, **kwargs):
        output = forward(*args, **kwargs)
        banned = torch.ones(VOCAB, dtype=torch.bool)
        banned[allowed] = False
        output.logits = output.logits.masked_fill(banned, -math.inf)
        return output

    monkeypatch.setattr(tiny_llama, "forward", masked)
    completions = complete(tiny_llama, prompts_of(16), 400, 2)
    assert {token for ids in completions for token in ids} == set(allowed)
    logits = torch.full((3, VOCAB), -math.inf)
    logits[:, allowed] = 1.0
    ends = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64)  # of what rand gives
    assert common.draw(logits, 1.0, ends).tolist() == [20, 40, 21]


def test_a_negative_temperature_is_refused(tiny_llama):
    """It would turn the distribution upside down."""
    with pytest.raises(ValueError, match="temperature"):
        complete(tiny_llama, prompts_of(16), temperature=-1.0)


# ---------------------------------------------------------------- where it stops
def test_every_eos_id_ends_a_completion(policy):
    """It is kept as the last token and nothing follows; what has none has max_new_tokens. Up to
    there the tokens are those of a run that never stops, so rows that leave do not disturb the
    others."""
    prompts = prompts_of(5)
    limit = 12
    endless = complete(policy, prompts, 20, limit, 1.0, eos_ids=[])
    assert all(len(ids) == limit for ids in endless)
    eos_ids = [token for token, _ in Counter(sum(endless, [])).most_common(12)[7:]]
    completions = complete(policy, prompts, 20, limit, 1.0, eos_ids=eos_ids)
    for ours, whole in zip(completions, endless, strict=True):
        end = next((t + 1 for t, token in enumerate(whole) if token in eos_ids), limit)
        assert ours == whole[:end]
    assert {ids[-1] for ids in completions} >= set(eos_ids)
    assert any(ids[-1] not in eos_ids for ids in completions)
    assert min(map(len, completions)) == 1


def test_sampling_ends_when_all_rows_have_ended(tiny_llama):
    """One prefill of each prompt, then one token a row; not one forward more than the longest
    completion needs; rows that have ended leave the batch before they are a quarter of it."""
    completions, shapes = forwards(
        tiny_llama,
        lambda: complete(tiny_llama, prompts_of(6), 8, 40, 1.0, eos_ids=range(16)),
    )
    assert len(shapes) == max(map(len, completions)) < 40
    assert shapes[0] == (5, 30)
    for t, (rows, tokens) in enumerate(shapes[1:], 1):
        unfinished = sum(len(ids) > t for ids in completions)
        assert unfinished <= rows < 4 / 3 * unfinished
        assert tokens == 1
    assert shapes[1][0] > 20 and shapes[-1][0] < 10


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_completions_have_at_most_max_new_tokens(limit, tiny_llama):
    """And at least one; every id is in the vocabulary."""
    completions = complete(tiny_llama, prompts_of(7), 4, limit)
    assert len(completions) == 4 * len(LENGTHS)
    assert max(map(len, completions)) == limit and min(map(len, completions)) >= 1
    assert all(0 <= token < VOCAB for ids in completions for token in ids)


@pytest.mark.parametrize("pad_id", [0, 1])
def test_pad_may_equal_eos(pad_id, tiny_llama, tmp_path, complete_with_logprobs):
    """EOS inside prompts, 0 (which pads on the left) as an EOS, and both as PAD in the batch:
    nothing is masked that was drawn."""
    tokenizer = sft.tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert common.load_tokenizer(str(tmp_path)).pad_token_id == tokenizer.eos_token_id == 1
    prompts = [[0], [1, 1, 7, 0, 0], [9, 1], [0, 0, 0, 30, 31, 32, 33]]
    completions, logprobs = complete_with_logprobs(
        tiny_llama, prompts, 8, 10, 1.0, eos_ids=[0, 1, 2, 3]
    )
    assert {0, 1} <= {ids[-1] for ids in completions}
    assert not any({0, 1} & set(ids[:-1]) for ids in completions)
    batch = ppo.completion_batch([p for p in prompts for _ in range(8)], completions, CPU)
    is_padding = batch["attention_mask"] == 0
    batch["inputs"][is_padding] = pad_id
    batch["targets"][is_padding] = pad_id
    mask = batch["mask"].bool()
    assert mask.sum(1).tolist() == [len(ids) for ids in completions]
    for i, ids in enumerate(completions):
        assert batch["targets"][i][mask[i]].tolist() == ids
    with torch.no_grad():
        expected, _ = ppo.token_logprobs_and_entropy(tiny_llama, batch)
    ours = torch.tensor([x for row in logprobs for x in row])
    torch.testing.assert_close(ours, expected[mask], rtol=1e-5, atol=2e-5)


# ---------------------------------------------------------------- what it does not depend on
@pytest.mark.parametrize("eos_ids", [(), range(1, 16)])
def test_token_budget_changes_no_token(eos_ids, sampled):
    """One prompt at a time, some, or all at once: it bounds the rows, and the tokens are the
    same."""
    prompts = prompts_of(8)
    whole = complete(sampled, prompts, 4, 20, eos_ids=eos_ids)
    group_tokens = 4 * (30 + 20)  # of the longest prompt's generations, whole
    for budget, most, waves in ((1, 1, 5), (2 * group_tokens - 1, 1, 5), (3 * group_tokens, 3, 2)):
        cut = {"token_budget": budget}
        ours, shapes = forwards(
            sampled, functools.partial(complete, sampled, prompts, 4, 20, eos_ids=eos_ids, **cut)
        )
        assert ours == whole
        assert max(rows for rows, _ in shapes) <= 4 * most
        if not eos_ids:  # each goes on to the end with all its rows
            assert max(rows for rows, _ in shapes) == 4 * most
            assert len(shapes) == waves * 20


def test_other_rows_change_nothing(policy):
    """The first rows' tokens are the same whatever prompts, longer ones too, come after them."""
    prompts = prompts_of(9)
    whole = complete(policy, prompts, 2)
    for n in (1, 2, 3):
        assert complete(policy, prompts[:n], 2) == whole[: 2 * n]
    other = prompts_of(10)
    assert complete(policy, prompts[:2] + other[2:], 2)[:4] == whole[:4]


def test_the_seed_alone_decides(tiny_llama):
    """Equal seeds give equal tokens whatever the global generator holds, and do not move it."""
    prompts = prompts_of(11)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = complete(tiny_llama, prompts, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert complete(tiny_llama, prompts, seed=3) == first
    assert complete(tiny_llama, prompts, seed=4) != first


def test_no_graph_is_kept(tiny_llama):
    """A model in training is sampled from without gradients."""
    grads = []
    hook = tiny_llama.register_forward_hook(
        lambda model, args, output: grads.append(output.logits.requires_grad)
    )
    complete(tiny_llama, prompts_of(14), limit=3)
    hook.remove()
    assert grads and not any(grads)


def test_gradient_checkpointing_does_not_matter(policy):
    """It would switch off the cache where gradients are taken; and no module changes its mode, so
    that dropout stays off (GPT-2's config has some)."""
    checkpointed = common.load_policy(
        policy.name_or_path, CPU, trainable=True, gradient_checkpointing=True
    )
    assert not any(module.training for module in checkpointed.modules())
    prompts = prompts_of(15)
    completions, shapes = forwards(checkpointed, lambda: complete(checkpointed, prompts))
    assert completions == complete(policy, prompts)
    assert shapes[0][1] == 30 and {tokens for _, tokens in shapes[1:]} == {1}
    assert not any(module.training for module in checkpointed.modules())


def test_autocast_samples_from_the_autocast_policy(tiny_qwen2, complete_with_logprobs):
    """In bfloat16 the cache holds what attention takes: log-probs agree with the training forward's
    up to its rounding, and differ from float32's."""
    prompts = prompts_of(8)
    with torch.autocast("cpu", torch.bfloat16):
        completions, logprobs = complete_with_logprobs(tiny_qwen2, prompts, 4, 12, 1.0, eos_ids=[])
        batch = ppo.completion_batch([p for p in prompts for _ in range(4)], completions, CPU)
        with torch.no_grad():
            rounded, _ = ppo.token_logprobs_and_entropy(tiny_qwen2, batch)
    with torch.no_grad():
        exact, _ = ppo.token_logprobs_and_entropy(tiny_qwen2, batch)
    ours = torch.tensor([x for row in logprobs for x in row])
    mask = batch["mask"].bool()
    rounding = (rounded - exact)[mask].abs()
    difference = (ours - rounded[mask]).abs()
    assert rounding.mean() > 1e-3
    assert difference.mean() < rounding.mean()
