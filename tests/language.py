"""A language with few enough completions to list all of them.

It has three prompts of different lengths, five letters, EOS and PAD. Completions have at most three
tokens. Their probabilities, and the optimum of every method, are computed exactly in float64,
independently of the scripts."""

import itertools
import json
from pathlib import Path

import tokenizers
import torch
import transformers

LETTERS = "abcde"
# at least two letters: rotary positions without BOS cannot distinguish b from bb
PROMPTS = ["be", "dac", "ecabdac"]
LENGTH = 3  # maximum tokens of a completion


def save_start(folder, seed, architecture="llama", pad_is_eos=False):
    """Save a small random transformer and its tokenizer, one token per letter, for --model.

    Returns the tokenizer."""
    names = ["[EOS]", *LETTERS] if pad_is_eos else ["[PAD]", "[EOS]", *LETTERS]
    vocab = {name: i for i, name in enumerate(names)}
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    letters.decoder = tokenizers.decoders.Fuse()
    special = dict(pad_token=names[0], eos_token="[EOS]", model_max_length=32)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, **special)
    ids = dict(vocab_size=len(names), bos_token_id=None, initializer_range=0.1)
    ids |= dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    if architecture == "gpt2":  # learned positions, biases, a tied head, dropout in the config
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
    """All completions as tuples of ids: with EOS first, then cut at the limit."""
    eos_id = tokenizer.eos_token_id
    others = [i for i in range(len(tokenizer)) if i != eos_id]
    ended = [(*c, eos_id) for n in range(length) for c in itertools.product(others, repeat=n)]
    return ended + list(itertools.product(others, repeat=length))


def texts_of(tokenizer, completions):
    """The letters of each completion; several share a text, because PAD and EOS have no letter."""
    letters = {tokenizer.convert_tokens_to_ids(x): x for x in LETTERS}
    return ["".join(letters.get(i, "") for i in c) for c in completions]


@torch.no_grad()
def law(model, tokenizer, completions, temperature=1.0):
    """log p(completion | prompt) with p = softmax(logits / temperature), (prompts, K) float64.

    model is a model or its directory. Completions of one length share a forward, without
    padding."""
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
            log_softmax = (logits / temperature).log_softmax(-1)
            token_logps = log_softmax.gather(-1, sequences[:, len(ids) :, None])
            logps[row, columns] = token_logps.sum((1, 2))
    model.train(was_training)
    return logps


def kl(p, q):
    """KL(p || q) in nats, mean over prompts. Shapes: log-probs (prompts, K) -> float."""
    return (p.exp() * (p - q)).masked_fill(p == -torch.inf, 0).sum(1).mean().item()


def normalize(weights):
    """Log-weights -> log-probs. Shapes: (prompts, K) -> (prompts, K)."""
    return weights - weights.logsumexp(1, keepdim=True)


def gibbs(ref, rewards, beta):
    """Maximum of E[r] - beta KL(p || p_ref): p_ref exp(r / beta) / Z, as log-probs.

    Rafailov et al. 2023, equation 4."""
    return normalize(ref + rewards / beta)


def k3_law(ref, rewards, beta, group_size):
    """Fixed point of the k3 loss, b p_ref / (lambda - r), as log-probs.

    b is beta G / (G - 1), since the mean of a group includes the sample. lambda, above every r,
    normalizes; it is found by bisection."""
    b = beta * group_size / (group_size - 1)
    low = rewards.amax(1, keepdim=True)
    high = low + b  # every term is at most p_ref, so the sum is at most 1
    for _ in range(100):
        middle = (low + high) / 2
        too_much = (b * ref.exp() / (middle - rewards)).sum(1, keepdim=True) > 1
        low = torch.where(too_much, middle, low)
        high = torch.where(too_much, high, middle)
    return normalize(ref - (high - rewards).log())


def best_of_n_law(ref, rewards, n):
    """Law of the best of n: p * (P(reward <= r)^n - P(reward < r)^n) / P(reward = r), as log-probs.

    The first of equal rewards wins; the order of samples does not depend on the samples."""
    p = ref.exp()
    result = torch.zeros_like(ref)
    for row in range(len(p)):
        for r in rewards[row].unique():
            level = rewards[row] == r
            below = p[row][rewards[row] < r].sum()
            mass = p[row][level].sum()
            result[row, level] = p[row][level] * ((below + mass) ** n - below**n) / mass
    return result.log()


def write_rows(path, rows):
    """Write a .jsonl file and return its path as text."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
