"""A language small enough to list: three prompts of different lengths, five letters, EOS and PAD,
completions of at most three tokens. Every completion's probability under a model, and so every
method's optimum, is computed here in plain float64, without a line of the scripts: nothing is
estimated, nothing is sampled."""

import itertools
import json
from pathlib import Path

import tokenizers
import torch
import transformers

LETTERS = "abcde"
PROMPTS = [
    "be",
    "dac",
    "ecabdac",
]  # one letter would not do: rotary positions without BOS cannot tell b from bb
LENGTH = 3  # tokens of a completion, at most


def save_start(folder, seed, architecture="llama", pad_is_eos=False):
    """A small transformer of wide random weights and its tokenizer, one token a letter, as --model
    reads them -> tokenizer."""
    names = ["[EOS]", *LETTERS] if pad_is_eos else ["[PAD]", "[EOS]", *LETTERS]
    letters = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: i for i, name in enumerate(names)})
    )
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    letters.decoder = tokenizers.decoders.Fuse()
    special = dict(pad_token=names[0], eos_token="[EOS]", model_max_length=32)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, **special)
    ids = dict(vocab_size=len(names), bos_token_id=None, initializer_range=0.1)
    ids |= dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    if (
        architecture == "gpt2"
    ):  # learned positions, biases, a tied head, dropout in the configuration
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=32, **ids)
    else:
        shape = dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        config = transformers.LlamaConfig(**shape, max_position_embeddings=32, **ids)
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def list_completions(tokenizer, length=LENGTH):
    """Every completion, ended by EOS or cut at the limit -> K tuples of ids, those that EOS ended
    first."""
    others = [i for i in range(len(tokenizer)) if i != tokenizer.eos_token_id]
    ended = [
        c + (tokenizer.eos_token_id,)
        for n in range(length)
        for c in itertools.product(others, repeat=n)
    ]
    return ended + list(itertools.product(others, repeat=length))


def texts_of(tokenizer, completions):
    """The letters of each. PAD and EOS have none, so that several completions share a text."""
    letters = {tokenizer.convert_tokens_to_ids(x): x for x in LETTERS}
    return ["".join(letters.get(i, "") for i in c) for c in completions]


@torch.no_grad()
def law(model, tokenizer, completions, temperature=1.0):
    """log p(completion | prompt), of every token the softmax of logits / temperature: (prompts, K)
    float64.

    model: a model, or the folder of one. Completions of one length share a forward, so that nothing
    is padded."""
    if not isinstance(model, torch.nn.Module):
        model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    was_training = model.training
    model.eval()
    logps = torch.zeros(len(PROMPTS), len(completions), dtype=torch.float64)
    for row, prompt in enumerate(PROMPTS):
        ids = [tokenizer.convert_tokens_to_ids(x) for x in prompt]
        for length in {len(c) for c in completions}:
            columns = [k for k, c in enumerate(completions) if len(c) == length]
            sequences = torch.tensor([ids + list(completions[k]) for k in columns])
            logits = model(sequences, use_cache=False).logits.double()[:, len(ids) - 1 : -1]
            taken = (
                (logits / temperature).log_softmax(-1).gather(-1, sequences[:, len(ids) :, None])
            )
            logps[row, columns] = taken.sum((1, 2))
    model.train(was_training)
    return logps


def kl(p, q):
    """KL(p || q) of laws (prompts, K) in logs, mean over prompts, in nats."""
    return (p.exp() * (p - q)).masked_fill(p == -torch.inf, 0).sum(1).mean().item()


def normalise(weights):
    """log weights (prompts, K) -> log probabilities."""
    return weights - weights.logsumexp(1, keepdim=True)


def gibbs(ref, rewards, beta):
    """The maximiser of E[r] - beta KL(p || p_ref): p_ref exp(r / beta) / Z, in logs (Rafailov et
    al. 2023, equation 4)."""
    return normalise(ref + rewards / beta)


def k3_law(ref, rewards, beta, group_size):
    """Where the k3 loss rests: b p_ref / (lambda - r), in logs, with b = beta G / (G-1), since the
    mean of a group includes the sample, and the lambda above every r that makes the sum 1, by
    halving an interval."""
    b = beta * group_size / (group_size - 1)
    low = rewards.amax(1, keepdim=True)
    high = low + b  # here every term is at most p_ref, so the sum at most 1
    for _ in range(100):
        middle = (low + high) / 2
        too_much = (b * ref.exp() / (middle - rewards)).sum(1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return normalise(ref - (high - rewards).log())


def best_of_n_law(ref, rewards, n):
    """The law of the best of n: p * (P(reward <= r)^n - P(reward < r)^n) / P(reward = r), in logs.
    The first of equal rewards wins, and which one is first has nothing to do with what it is."""
    p, result = ref.exp(), torch.zeros_like(ref)
    for row in range(len(p)):
        for r in rewards[row].unique():
            level = rewards[row] == r
            below, mass = p[row][rewards[row] < r].sum(), p[row][level].sum()
            result[row, level] = p[row][level] * ((below + mass) ** n - below**n) / mass
    return result.log()


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
