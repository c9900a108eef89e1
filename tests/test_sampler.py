"""common.sample: its distribution, where completions end, and invariances."""

import functools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ARGS, CPU, VOCAB, load_policy, ragged_ids

import common
import ppo
import sft

# lengths of prompts; 30 is far above Gemma 2's window of 8
LENGTHS = ((1, 1), (17, 1), (5, 1), (30, 1), (2, 1))


def prompts_of(seed, lengths=LENGTHS):
    return ragged_ids(seed, lengths)[0]


def sample(model, prompts, generations=2, limit=12, temperature=0.7, *, eos_ids=(1, 5), **options):
    """common.sample of lists of ids, with a seed instead of a generator."""
    configured = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = list(eos_ids)
    rollouts = common.sample(
        model,
        [{"prompt_ids": prompt} for prompt in prompts],
        num_generations=generations,
        max_new_tokens=limit,
        temperature=temperature,
        rng=torch.Generator().manual_seed(options.pop("seed", 1)),
        **options,
    )
    model.generation_config.eos_token_id = configured
    return rollouts


def complete(*args, **kwargs):
    """The completions of sample(...)."""
    return [rollout["completion_ids"] for rollout in sample(*args, **kwargs)]


@pytest.fixture
def sample_with_logprobs(monkeypatch):
    """sample(...) -> rollouts, and the log-probs that their tokens were sampled with.

    Every row and step has its own random number, which identifies a token."""

    def run(model, prompts, generations, limit, temperature, *, eos_ids, seed=1):
        logprob_of = {}
        sample_tokens = common.sample_tokens

        def spy(logits, temperature, noise):
            tokens = sample_tokens(logits, temperature, noise)
            logps = (logits / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            logprob_of.update(zip(noise.tolist(), logps.tolist(), strict=True))
            return tokens

        with monkeypatch.context() as patch:
            patch.setattr(common, "sample_tokens", spy)
            rollouts = sample(
                model, prompts, generations, limit, temperature, eos_ids=eos_ids, seed=seed
            )
        rng = torch.Generator().manual_seed(seed)
        noise = torch.rand(len(rollouts), limit, generator=rng, dtype=torch.float64).tolist()
        logprobs = [
            logprob_of[noise[row][t]]
            for row, rollout in enumerate(rollouts)
            for t in range(len(rollout["completion_ids"]))
        ]
        return rollouts, torch.tensor(logprobs)

    return run


@torch.no_grad()
def next_probs(model, prompt, temperature):
    """The exact distribution of the token after one prompt, by model.forward."""
    logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    return (logits / temperature).softmax(-1)


def chi_square(tokens, probs):
    """Pearson's statistic minus its mean, in standard deviations; rare tokens are one class."""
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
    """One row without cache or padding, with a forward of the whole sequence for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit and (len(ids) == len(prompt) or ids[-1] not in eos_ids):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def forwards(model, call):
    """Run call(); returns its result and the shape of the ids of each forward."""
    shapes = []
    hook = model.register_forward_hook(
        lambda model, args, kwargs, output: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    result = call()
    hook.remove()
    return result, shapes


# ---------------------------------------------------------------- the distribution
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_training_forward(temperature, sampled, sample_with_logprobs):
    """Left padding, positions, cache and rows that leave early agree with one padded forward."""
    rollouts, logprobs = sample_with_logprobs(
        sampled, prompts_of(1), 3, 14, temperature, eos_ids=range(1, 8)
    )
    assert len({len(rollout["completion_ids"]) for rollout in rollouts}) > 3
    batch = ppo.completion_batch(rollouts, CPU)
    with torch.no_grad():
        expected, _ = ppo.token_logprobs_and_entropy(sampled, batch, temperature)
    torch.testing.assert_close(logprobs, expected[batch["mask"].bool()], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_from_the_whole_distribution(temperature, tiny_llama, tmp_path):
    """The generation config of the checkpoint (top_k, temperature, penalties) has no effect."""
    saved = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama.name_or_path)
    saved.generation_config = transformers.GenerationConfig(
        do_sample=True,
        top_k=2,
        top_p=0.1,
        min_p=0.5,
        temperature=0.2,
        repetition_penalty=5.0,
        suppress_tokens=[7, 8],
        eos_token_id=[1, 9],
    )
    saved.save_pretrained(tmp_path)
    sft.tiny_tokenizer().save_pretrained(tmp_path)
    model = load_policy(tmp_path)
    assert model.generation_config.eos_token_id == [1, 9]
    assert model.generation_config.top_k is None
    prompt = prompts_of(2)[1]
    tokens = [ids[0] for ids in complete(model, [prompt], 4000, 1, temperature)]
    assert len(set(tokens)) > 30
    assert chi_square(tokens, next_probs(model, prompt, temperature)) < 4
    # a wrong temperature would be visible
    assert chi_square(tokens, next_probs(model, prompt, 0.85)) > 10


def test_later_tokens_follow_their_distribution(tiny_qwen2):
    """The second token given the first; the noise of two steps is independent."""
    prompt = prompts_of(3)[2]
    completions = complete(tiny_qwen2, [prompt], 6000, 2, 0.7, eos_ids=[])
    [(first, n)] = Counter(ids[0] for ids in completions).most_common(1)
    assert n > 300
    seconds = [ids[1] for ids in completions if ids[0] == first]
    assert chi_square(seconds, next_probs(tiny_qwen2, prompt + [first], 0.7)) < 4


def test_generations_belong_to_their_prompt(policy):
    """The generations of a prompt are adjacent, in the order of the prompts, and differ."""
    prompts = prompts_of(4)
    generations = 1000
    rollouts = sample(policy, prompts, generations, 1, eos_ids=[])
    assert [x["prompt_ids"] for x in rollouts[::generations]] == prompts
    completions = [rollout["completion_ids"] for rollout in rollouts]
    probs = [next_probs(policy, prompt, 0.7) for prompt in prompts]
    for i in range(len(prompts)):
        tokens = [ids[0] for ids in completions[i * generations : (i + 1) * generations]]
        fits = [chi_square(tokens, p) for p in probs]
        assert fits[i] < 4 and all(fit > 12 for j, fit in enumerate(fits) if j != i)
        assert len(set(tokens)) > 3


def test_greedy_is_the_argmax_of_full_forwards(policy):
    """Temperature 0: all generations of a prompt are equal."""
    prompts = prompts_of(12)
    eos_ids = [1, 2, 3, 4, 5, 6]
    completions = complete(policy, prompts, 2, 10, 0.0, eos_ids=eos_ids)
    for i, prompt in enumerate(prompts):
        expected = greedy_by_hand(policy, prompt, 10, eos_ids)
        assert completions[2 * i] == completions[2 * i + 1] == expected


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_sample_tokens_inverts_the_cdf(temperature):
    """On a fine grid of noise, the share of each token is its probability."""
    probs = torch.tensor([0.5, 0.0, 0.125, 0.375], dtype=torch.float64)
    logits = temperature * probs.log()
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = common.sample_tokens(logits.float().expand(1000, 4), temperature, grid)
    assert tokens.tolist() == sorted(tokens.tolist())
    assert torch.bincount(tokens, minlength=4).tolist() == [500, 0, 125, 375]


def test_a_token_of_probability_zero_is_never_sampled(tiny_llama, monkeypatch):
    """Not even at the ends of the vocabulary, for the smallest and largest noise."""
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
    ends = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64)  # the range of torch.rand
    assert common.sample_tokens(logits, 1.0, ends).tolist() == [20, 40, 21]


# ---------------------------------------------------------------- where completions end
def test_every_eos_id_ends_a_completion(policy):
    """EOS is kept as the last token; a completion without EOS has max_new_tokens tokens.

    The tokens agree with a run without EOS, so rows that leave do not affect the others."""
    prompts = prompts_of(5)
    limit = 12
    endless = complete(policy, prompts, 20, limit, 1.0, eos_ids=[])
    assert all(len(ids) == limit for ids in endless)
    eos_ids = [token for token, _ in Counter(sum(endless, [])).most_common(12)[7:]]
    rollouts = sample(policy, prompts, 20, limit, 1.0, eos_ids=eos_ids)
    for rollout, ids in zip(rollouts, endless, strict=True):
        end = next((t + 1 for t, token in enumerate(ids) if token in eos_ids), None)
        assert rollout["completion_ids"] == ids[:end]
        assert rollout["finished"] == (end is not None)
    completions = [rollout["completion_ids"] for rollout in rollouts]
    assert {ids[-1] for ids in completions} >= set(eos_ids)
    assert not all(rollout["finished"] for rollout in rollouts)
    assert min(map(len, completions)) == 1


def test_sampling_ends_when_all_rows_have_ended(tiny_llama):
    """As many forwards as the longest completion has tokens, the first one for the prompts.

    Finished rows leave the batch once they are a quarter of it."""
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
    """They also have at least one token, and all ids are in the vocabulary."""
    completions = complete(tiny_llama, prompts_of(7), 4, limit)
    assert len(completions) == 4 * len(LENGTHS)
    assert max(map(len, completions)) == limit and min(map(len, completions)) >= 1
    assert all(0 <= token < VOCAB for ids in completions for token in ids)


@pytest.mark.parametrize("pad_id", [0, 1])
def test_pad_may_equal_eos(pad_id, tiny_llama, tmp_path, sample_with_logprobs):
    """EOS is inside prompts, 0 pads on the left and is an EOS, and both pad the batch."""
    tokenizer = sft.tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert common.load_tokenizer(str(tmp_path)).pad_token_id == tokenizer.eos_token_id == 1
    prompts = [[0], [1, 1, 7, 0, 0], [9, 1], [0, 0, 0, 30, 31, 32, 33]]
    rollouts, logprobs = sample_with_logprobs(tiny_llama, prompts, 8, 10, 1.0, eos_ids=[0, 1, 2, 3])
    completions = [rollout["completion_ids"] for rollout in rollouts]
    assert {0, 1} <= {ids[-1] for ids in completions}
    assert not any({0, 1} & set(ids[:-1]) for ids in completions)
    batch = ppo.completion_batch(rollouts, CPU)
    is_padding = batch["attention_mask"] == 0
    batch["inputs"][is_padding] = pad_id
    batch["targets"][is_padding] = pad_id
    mask = batch["mask"].bool()
    assert mask.sum(1).tolist() == [len(ids) for ids in completions]
    for i, ids in enumerate(completions):
        assert batch["targets"][i][mask[i]].tolist() == ids
    with torch.no_grad():
        expected, _ = ppo.token_logprobs_and_entropy(tiny_llama, batch)
    torch.testing.assert_close(logprobs, expected[mask], rtol=1e-5, atol=2e-5)


def test_a_rollout_is_its_example_with_a_completion(tiny_llama):
    """Examples are copied, not changed."""
    examples = [{"prompt_ids": ids, "row": {"number": i}} for i, ids in enumerate(prompts_of(13))]
    rng = torch.Generator().manual_seed(1)
    rollouts = common.sample(tiny_llama, examples, num_generations=2, max_new_tokens=3, rng=rng)
    assert [rollout["row"]["number"] for rollout in rollouts] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for i, rollout in enumerate(rollouts):
        assert rollout.keys() == {"prompt_ids", "row", "completion_ids", "finished"}
        assert rollout["prompt_ids"] == examples[i // 2]["prompt_ids"]
    assert all(example.keys() == {"prompt_ids", "row"} for example in examples)


# ---------------------------------------------------------------- invariances
@pytest.mark.parametrize("eos_ids", [(), range(1, 16)])
def test_token_budget_changes_no_token(eos_ids, sampled):
    """It limits the number of prompts that are sampled together."""
    prompts = prompts_of(8)
    whole = complete(sampled, prompts, 4, 20, eos_ids=eos_ids)
    group_tokens = 4 * (30 + 20)  # of all generations of the longest prompt
    for budget, most, waves in ((1, 1, 5), (2 * group_tokens - 1, 1, 5), (3 * group_tokens, 3, 2)):
        call = functools.partial(
            complete, sampled, prompts, 4, 20, eos_ids=eos_ids, token_budget=budget
        )
        completions, shapes = forwards(sampled, call)
        assert completions == whole
        assert max(rows for rows, _ in shapes) <= 4 * most
        if not eos_ids:  # no row leaves early
            assert max(rows for rows, _ in shapes) == 4 * most
            assert len(shapes) == waves * 20


def test_other_rows_change_nothing(policy):
    """The tokens of the first prompts do not depend on the prompts after them."""
    prompts = prompts_of(9)
    whole = complete(policy, prompts, 2)
    for n in (1, 2, 3):
        assert complete(policy, prompts[:n], 2) == whole[: 2 * n]
    other = prompts_of(10)
    assert complete(policy, prompts[:2] + other[2:], 2)[:4] == whole[:4]


def test_tokens_depend_on_the_seed_only(tiny_llama):
    """The global generator has no effect and is not used."""
    prompts = prompts_of(11)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = complete(tiny_llama, prompts, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert complete(tiny_llama, prompts, seed=3) == first
    assert complete(tiny_llama, prompts, seed=4) != first


def test_no_graph_is_kept(tiny_llama):
    """Sampling from a model in training computes no gradients."""
    grads = []
    hook = tiny_llama.register_forward_hook(
        lambda model, args, output: grads.append(output.logits.requires_grad)
    )
    complete(tiny_llama, prompts_of(14), limit=3)
    hook.remove()
    assert grads and not any(grads)


def test_gradient_checkpointing_changes_no_token(policy):
    """The cache is used, and all modules stay in eval mode."""
    tokenizer = sft.tiny_tokenizer()
    args = SimpleNamespace(**vars(ARGS) | {"gradient_checkpointing": True})
    checkpointed = common.load_policy(policy.name_or_path, tokenizer, args, CPU, trainable=True)
    prompts = prompts_of(15)
    completions, shapes = forwards(checkpointed, lambda: complete(checkpointed, prompts))
    assert completions == complete(policy, prompts)
    assert shapes[0][1] == 30 and {tokens for _, tokens in shapes[1:]} == {1}
    assert not any(module.training for module in checkpointed.modules())


def test_bfloat16_samples_from_the_bfloat16_policy(tiny_qwen2, sample_with_logprobs, monkeypatch):
    """Sampling rounds too; it differs from the training forward by less than the rounding error."""
    monkeypatch.setattr(tiny_qwen2, "compute_dtype", "bfloat16")
    rollouts, logprobs = sample_with_logprobs(tiny_qwen2, prompts_of(8), 4, 12, 1.0, eos_ids=[])
    batch = ppo.completion_batch(rollouts, CPU)
    mask = batch["mask"].bool()
    with torch.no_grad():
        rounded, _ = ppo.token_logprobs_and_entropy(tiny_qwen2, batch)
        monkeypatch.setattr(tiny_qwen2, "compute_dtype", "float32")
        exact, _ = ppo.token_logprobs_and_entropy(tiny_qwen2, batch)
    rounding = (rounded - exact)[mask].abs()
    difference = (logprobs - rounded[mask]).abs()
    assert rounding.mean() > 1e-3
    assert (logprobs - exact[mask]).abs().mean() > 1e-3
    assert difference.mean() < rounding.mean()
