"""Every family of causal language models that transformers knows, tiny: it is sampled from and
trained with the log-probs of its own forward, or refused in a sentence when it is loaded."""

import pytest
import torch
import transformers
from conftest import CPU, VOCAB, distance, gradients, ragged_batch, ragged_ids
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import common
import grpo

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# These have to be right, with transformers 5.24; the others may be refused too.
STATES = """bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lara_mini
lfm2 lfm2_moe lfm3 mamba mamba2 nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text
qwen3_5_text qwen3_next qwen4_exp_text zamba zamba2""".split()
KEYS = """afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 beam bert-generation biogpt
bitnet bloom codegen cohere cohere2 cohere2_moe ctrl cwm deepseek_v2 deepseek_v3 deepseek_v32
diffllama doge dots1 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon flex_olmo flint fuyu
gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text
glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox
gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoeshared
helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax internlm3 iquestcoder
jais2 jetmoe kolibri1 laguna llama longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2
minimax_m3_vl_text ministral ministral3 mistral mixtral moshi moss_transcribe_diarize mpt nanochat
nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe
qwen3 qwen3_moe sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma
whisper xglm youtu zaya""".split()
# transformers holds the time step of these above a limit in a prompt and not after it
LOOSE = ["nemotron_h", "zamba2"]

# what a config calls its sizes; windows are shorter than a row, so that they matter
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
    "moshi": dict(sliding_window=64),  # its own forward has no window
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
    """The defaults of a config class, with sizes made small and two layers of different types."""
    default = vars(cls())
    is_latent = default.get("kv_lora_rank") is not None  # keys of all heads from a few numbers
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
    return cls(**{**options, **{k: v for k, v in special.items() if k not in cls.sub_configs}})


def save_tiny(family, folder):
    """A model of that family with wide random weights, so that its tokens depend on the context."""
    config = tiny_config(transformers.CONFIG_MAPPING[family], SPECIAL.get(family, {}))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    if sum(p.numel() for p in model.parameters()) > 10_000_000:
        raise ValueError("a size of it is not known here")
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
    """(T, V), by the model's own forward of one row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


PROMPTS = [[*range(5, 16)], [20, 21], [30], [*range(40, 45)]]
GENERATIONS = 3
LIMIT = 14


def check(model, tolerance, monkeypatch):
    """Its samples and their log-probs, when drawn and when trained on, are those of whole forwards
    of one row, without padding and cache."""
    drawn = {}  # noise, which is each token's own: log-probs that it was drawn from
    draw = common.draw

    def spy(logits, temperature, noise):
        drawn.update(zip(noise.tolist(), logits.log_softmax(-1), strict=True))
        return draw(logits, temperature, noise)

    monkeypatch.setattr(common, "draw", spy)
    completions = common.sample(
        model,
        PROMPTS,
        num_generations=GENERATIONS,
        max_new_tokens=LIMIT,
        temperature=2.0,  # so that rows differ
        eos_ids=[*range(1, 12)],
        rng=torch.Generator().manual_seed(1),
    )
    assert len(set(map(len, completions))) > 2  # rows leave at different times
    prompts = [prompt for prompt in PROMPTS for _ in range(GENERATIONS)]
    batch = grpo.completion_batch(prompts, completions, CPU)
    with torch.no_grad():
        trained, _ = grpo.token_logprobs_and_entropy(model, batch)
    rng = torch.Generator().manual_seed(1)
    noise = torch.rand(len(prompts), LIMIT, generator=rng, dtype=torch.float64)
    for i, ids in enumerate(completions):
        own = own_logprobs(model, prompts[i] + ids)[len(prompts[i]) - 1 : -1]
        ours = torch.stack([drawn[x.item()] for x in noise[i, : len(ids)]])
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=tolerance)
        own = own.gather(1, torch.tensor(ids)[:, None])[:, 0]
        ours = trained[i][batch["mask"][i].bool()]
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-3)
    # the test could see it if a state were lost
    one = own_logprobs(model, [9, 10, 11, 12])[-1]
    other = own_logprobs(model, [9, 33, 11, 12])[-1]
    assert (one - other).abs().max() > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_right_or_refused(family, tmp_path, capsys, monkeypatch):
    is_needed = family in KEYS + STATES
    try:
        save_tiny(family, tmp_path)
    except Exception as error:
        assert not is_needed, error
        pytest.skip(f"not made: {error!r:.100}")
    try:
        model = common.load_policy(str(tmp_path), CPU, trainable=True)
    except SystemExit as end:
        message = capsys.readouterr().err
        assert not is_needed, message
        assert end.code == 2 and message.startswith("error: ") and message.count("\n") == 1
        return
    check(model, 1e-2 if family in LOOSE else 1e-3, monkeypatch)


@pytest.mark.parametrize("family", ["qwen3_5_text", "mamba2"])
def test_states_instead_of_keys(family, tmp_path, monkeypatch):
    """As above; and a right-padded batch has the gradient of its rows one by one."""
    save_tiny(family, tmp_path)
    model = common.load_policy(str(tmp_path), CPU, trainable=True, gradient_checkpointing=True)
    check(model, 1e-3, monkeypatch)
    grpo.token_logprobs_and_entropy(model, ragged_batch(2))[0].sum().backward()
    ours = gradients(model)
    for prompt, completion in zip(*ragged_ids(2), strict=True):
        batch = grpo.completion_batch([prompt], [completion], CPU)
        grpo.token_logprobs_and_entropy(model, batch)[0].sum().backward()
    assert distance(ours, gradients(model)) < 1e-4


@pytest.mark.parametrize(
    "family, word", [("rwkv", "padding"), ("openai-gpt", "size"), ("roformer", "head")]
)
def test_what_is_not_right_is_refused(family, word, tmp_path, capsys):
    """One whose states take in the padding on the left; one without a cache; one whose head is no
    plain product."""
    save_tiny(family, tmp_path)
    with pytest.raises(SystemExit) as end:
        common.load_policy(str(tmp_path), CPU, trainable=True)
    message = capsys.readouterr().err
    assert end.value.code == 2 and word in message
    assert message.startswith("error: ") and message.count("\n") == 1
