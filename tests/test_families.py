"""Tiny models of every architecture of causal language models in transformers.

Sampling (left padding, a cache that is copied and compacted) and training (right padding,
head_logits) have the log-probs of forwards of single rows, without padding or cache."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import (
    ARGS,
    CPU,
    VOCAB,
    as_rollouts,
    distance,
    gradients,
    ragged_batch,
    ragged_ids,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import common
import grpo
import sft

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# These must work with transformers 5.24. The others may also fail with an error.
RIGHT = """afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 bailing_hybrid bamba beam
bert-generation biogpt bitnet bloom codegen cohere cohere2 cohere2_moe ctrl cwm deepseek_v2
deepseek_v3 deepseek_v32 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe
falcon falcon_h1 falcon_mamba flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text
gemma4 gemma4_text gemma4_unified gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa
got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite
granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text
hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax internlm3 iquestcoder jais2 jamba jetmoe
kimi_linear kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama longcat_flash mamba mamba2 mellum
mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral moshi
moss_transcribe_diarize mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt
persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe
qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen4_exp_text sarvam_mla sarvam_moe seed_oss
smollm3 solar_open stablelm starcoder2 vaultgemma whisper xglm youtu zamba zamba2 zaya""".split()
# These load without an error, but sampling or training has wrong log-probs.
WRONG = """bart bigbird_pegasus blenderbot blenderbot-small deepseek_v4 git marian mbart mvp
pegasus plbart reformer rwkv trocr xlnet""".split()
FAST = [
    "qwen3_5_text",  # states in some layers, keys in others
    "mamba2",  # states only
    "lfm2",  # convolutions
    "deepseek_v3",  # latent attention
    "gpt_oss",  # attention sinks
    "bloom",  # ALiBi
    "opt",  # learned positions with an offset
    "cohere",  # multiplied logits
    "granite",  # divided logits
]
# their time step has a lower limit in a prompt, but not after it
LOOSE = ["nemotron_h", "zamba2"]

# names of sizes in configs; windows are shorter than a row
SIZES = dict(
    vocab_size=VOCAB,
    max_position_embeddings=128,
    n_positions=128,
    n_ctx=128,
    hidden_size=32,
    embedding_size=32,
    word_embed_proj_dim=32,
    n_embd=32,
    d_model=32,
    num_hidden_layers=2,
    num_layers=2,
    n_layer=2,
    n_layers=2,
    encoder_layers=1,
    decoder_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    n_head=4,
    n_heads=4,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    head_dim=8,
    rotary_dim=4,
    intermediate_size=48,
    n_inner=48,
    ffn_dim=48,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    block_ff_dim=48,
    ffn_hidden_size=48,
    sliding_window=8,
    window_size=8,
    attention_window_size=8,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    expert_ffn_hidden_size=16,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_topk=2,
    moe_k=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    index_n_heads=2,
    index_head_dim=8,
    index_topk=64,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_heads=4,
    linear_head_dim=8,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_n_groups=1,
    mamba_d_state=8,
    mamba_d_ssm=64,
    mamba_num_heads=8,
    mamba_head_dim=8,
    n_mamba_heads=2,
    n_groups=1,
    state_size=8,
    ssm_state_size=8,
    vocab_size_per_layer_input=VOCAB,
    hidden_size_per_layer_input=8,
    pad_token_id=0,
    bos_token_id=2,
    eos_token_id=1,
    initializer_range=0.2,
    init_std=0.2,
    is_decoder=True,
    attention_dropout=0.0,
)
STATE_AND_KEYS = dict(layer_types=["linear_attention", "full_attention"])
TWO_OF_EACH = ["linear_attention", "hybrid"] * 2
GEMMA4 = dict(global_head_dim=8, num_global_key_value_heads=2, num_kv_shared_layers=0)
GEMMA4 |= dict(layer_types=["sliding_attention", "full_attention"])
JAMBA = dict(attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4)
SPECIAL = {
    "bamba": dict(attn_layer_indices=[1]),
    "dots1": dict(n_shared_experts=1),
    "gemma3n_text": dict(
        num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"]
    ),
    "gemma4": dict(text_config=GEMMA4),
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": STATE_AND_KEYS,
    "jamba": JAMBA | dict(expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "longcat_flash": dict(zero_expert_num=2, head_dim=8),
    "mamba2": dict(num_heads=8),
    "minicpm3": dict(scale_emb=1),
    "moshi": dict(sliding_window=64),  # its forward without cache ignores the window
    "nemotron_h": STATE_AND_KEYS,
    "qwen4_exp_text": dict(
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=64,
        indexer_compress_ratio=4,
        ngram_vocab_size_base=100,
    ),
    "recurrent_gemma": dict(
        num_hidden_layers=3, block_types=["recurrent", "attention"], lru_width=32
    ),
    "reformer": dict(axial_pos_embds=False),
    "rembert": dict(input_embedding_size=32, output_embedding_size=32),
    "roc_bert": dict(shape_vocab_size=VOCAB, pronunciation_vocab_size=VOCAB),
    "xmod": dict(default_language="en_XX"),
    "zamba": JAMBA | dict(num_hidden_layers=4, layers_block_type=TWO_OF_EACH),
    "zamba2": dict(num_hidden_layers=4, layers_block_type=TWO_OF_EACH, n_mamba_heads=8),
    "zaya": dict(num_experts_per_tok=1),
}


def tiny_config(cls, special):
    """The defaults of a config class with small sizes and two layers of different types."""
    default = vars(cls())
    is_latent = default.get("kv_lora_rank") is not None  # multi-head latent attention
    options = {}
    for name in cls.__dataclass_fields__.keys() | cls.attribute_map.keys():
        if name in SIZES and not isinstance(default.get(name), dict):
            options[name] = SIZES[name]
    if is_latent:
        options.pop("head_dim", None)
        options["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name in ("q_lora_rank", "n_inner"):
        if default.get(name) is None:
            options.pop(name, None)
    for name in ("layer_types", "mlp_layer_types"):
        if default.get(name):
            options[name] = (list(dict.fromkeys(default[name])) * 2)[:2]
    for name in cls.sub_configs:
        if default.get(name) is not None:
            config = tiny_config(type(default[name]), special.get(name, {}))
            options[name] = config.to_dict()
    options |= {name: x for name, x in special.items() if name not in cls.sub_configs}
    return cls(**options)


def save_tiny(family, folder):
    """Save a model with wide random weights, so its tokens depend on the context."""
    config = tiny_config(transformers.CONFIG_MAPPING[family], SPECIAL.get(family, {}))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    if sum(p.numel() for p in model.parameters()) > 10_000_000:
        raise ValueError("a size of its config is not in SIZES")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and weight.std() < 0.1 and not name.endswith("A_log"):
                weight.normal_(std=0.2)
            elif name.endswith("bias") and "dt" not in name and not weight.any():
                weight.normal_(std=0.1)
    model.save_pretrained(folder)


def own_logprobs(model, ids):
    """Log-probs by model.forward of a single row, (T, V)."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


PROMPTS = [[*range(5, 16)], [20, 21], [30], [*range(40, 45)]]
GENERATIONS = 3
LIMIT = 14


def load_policy(path, gradient_checkpointing=False):
    args = SimpleNamespace(**vars(ARGS) | {"gradient_checkpointing": gradient_checkpointing})
    tokenizer = sft.tiny_tokenizer()
    return common.load_policy(str(path), tokenizer, args, CPU, trainable=True)


@torch.no_grad()
def completion_logprobs(model, rollouts):
    """Log-probs of each completion as in training."""
    batch = grpo.completion_batch(rollouts, CPU)
    logprobs, _ = grpo.token_logprobs_and_entropy(model, batch)
    return [x[mask.bool()] for x, mask in zip(logprobs, batch["mask"], strict=True)]


def check(model, tolerance, monkeypatch):
    """Compare the log-probs of sampling and training with forwards of single rows."""
    sampled_from = {}  # noise, which is different for every token -> log-probs (V,)
    sample_tokens = common.sample_tokens

    def spy(logits, temperature, noise):
        sampled_from.update(zip(noise.tolist(), logits.log_softmax(-1), strict=True))
        return sample_tokens(logits, temperature, noise)

    monkeypatch.setattr(common, "sample_tokens", spy)
    model.generation_config.eos_token_id = [*range(1, 12)]
    rollouts = common.sample(
        model,
        [{"prompt_ids": prompt} for prompt in PROMPTS],
        num_generations=GENERATIONS,
        max_new_tokens=LIMIT,
        temperature=2.0,  # rows differ
        rng=torch.Generator().manual_seed(1),
    )
    # rows leave the batch at different steps
    assert len({len(rollout["completion_ids"]) for rollout in rollouts}) > 2
    # shared tokens end with the shortest prompt, so the groups share more than the whole batch
    groups = [rollouts[i : i + GENERATIONS] for i in range(0, len(rollouts), GENERATIONS)]
    trained = [completion_logprobs(model, part) for part in [rollouts, *groups]]
    trained = [trained[0], [x for group in trained[1:] for x in group]]
    rng = torch.Generator().manual_seed(1)
    noise = torch.rand(len(rollouts), LIMIT, generator=rng, dtype=torch.float64)
    for i, rollout in enumerate(rollouts):
        prompt = rollout["prompt_ids"]
        ids = rollout["completion_ids"]
        expected = own_logprobs(model, prompt + ids)[len(prompt) - 1 : -1]
        sampled = torch.stack([sampled_from[x.item()] for x in noise[i, : len(ids)]])
        torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=tolerance)
        expected = expected.gather(1, torch.tensor(ids)[:, None])[:, 0]
        for logprobs in trained:
            torch.testing.assert_close(logprobs[i], expected, rtol=1e-4, atol=1e-3)
    # a lost state or key would be visible
    logprobs = own_logprobs(model, [9, 10, 11, 12])[-1]
    other = own_logprobs(model, [9, 33, 11, 12])[-1]
    assert (logprobs - other).abs().max() > 0.02


@pytest.mark.parametrize("family", FAST)
def test_sampling_and_training(family, tmp_path, monkeypatch):
    """check, and the gradient of a padded batch is the sum of the gradients of its rows."""
    save_tiny(family, tmp_path)
    model = load_policy(tmp_path, gradient_checkpointing=True)
    check(model, 1e-3, monkeypatch)
    grpo.token_logprobs_and_entropy(model, ragged_batch(2))[0].sum().backward()
    batch_gradient = gradients(model)
    for rollout in as_rollouts(*ragged_ids(2)):
        batch = grpo.completion_batch([rollout], CPU)
        grpo.token_logprobs_and_entropy(model, batch)[0].sum().backward()
    assert distance(batch_gradient, gradients(model)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path, monkeypatch):
    try:
        save_tiny(family, tmp_path)
        model = load_policy(tmp_path)
    except (Exception, SystemExit) as error:
        assert family not in RIGHT + WRONG, error
        pytest.skip(f"not made or not loaded: {error!r:.100}")
    tolerance = 1e-2 if family in LOOSE else 1e-3
    if family in RIGHT:
        check(model, tolerance, monkeypatch)
    elif family in WRONG:
        with pytest.raises((AssertionError, IndexError, RuntimeError)):
            check(model, tolerance, monkeypatch)
    else:
        with contextlib.suppress(RuntimeError, ValueError):
            check(model, tolerance, monkeypatch)


@pytest.mark.parametrize("family", ["roformer", "recurrent_gemma"])
def test_an_unknown_logit_transform_is_refused(family, tmp_path, capsys):
    save_tiny(family, tmp_path)
    with pytest.raises(SystemExit) as end:
        load_policy(tmp_path)
    assert end.value.code == 2
    assert "head_logits does not match the logits" in capsys.readouterr().err
