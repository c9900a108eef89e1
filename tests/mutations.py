"""One-line errors of the kind that real projects shipped, each put into a copy of the scripts; the
tests that should see it are run on the copy, and one of them must fail:

    python tests/mutations.py            all of them, ten minutes
    python tests/mutations.py ppo.py     those with these words in file, text or sentence
    python tests/mutations.py --passed   without running the tests first on the copy as it is

Prints which test killed which mutant, and of what if not by an assertion. A mutant that survives,
whose text does not occur exactly once, or that breaks the import and so dies of nothing, is a
failure: exit status 1. The tests must pass on the copy before anything is changed. One process
serves all mutants, since loading torch and transformers takes long; what was imported from the copy
is forgotten in between."""

import contextlib
import io
import shutil
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import pytest

Mutant = namedtuple("Mutant", "file old new why tests")
MUTANTS = [
    Mutant(
        "common.py",
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(2.0)",
        "FSDP's mean over processes, where weights carry the whole count",
        "test_processes.py::test_two_processes_compute_what_one_does",
    ),
    Mutant(
        "common.py",
        'return lists + [[]] * (all_reduce(len(lists), op="max") - len(lists))',
        "return lists",
        "a process without rows leaves the others waiting",
        "test_processes.py::test_shares_of_micro_batches",
    ),
    Mutant(
        "common.py",
        "order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))",
        "prompts = sorted(prompts, key=len, reverse=True)\n    order = list(range(len(prompts)))",
        "completions come back in the order of their prompts' lengths",
        "test_sampler.py::test_logprobs_are_those_of_the_training_forward[llama-1.0]",
    ),
    Mutant(
        "common.py",
        "    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)\n    cache",
        "    position_ids = torch.arange(inputs.shape[1], device=device).expand_as(inputs)\n    cache",
        "left padding without positions of its own (RLHF book, trl#469)",
        "test_sampler.py::test_logprobs_are_those_of_the_training_forward[gpt2-1.0]",
    ),
    Mutant(
        "common.py",
        "cdf = (logits / temperature).softmax(-1)",
        "cdf = logits.softmax(-1)",
        "the sampler forgets the temperature",
        "test_sampler.py::test_draws_from_the_whole_distribution[0.7]",
    ),
    Mutant(
        "common.py",
        "token = choose(logits.float(), noise=noise[row, t])",
        "token = choose(logits.float(), noise=noise[: len(row), t])",
        "noise belongs to the place in the batch, so that dropping finished rows changes tokens",
        "test_sampler.py::test_logprobs_are_those_of_the_training_forward[llama-1.0]",
    ),
    Mutant(
        "common.py",
        "            row = row[unfinished]\n",
        "            row = row[unfinished].flip(0)\n",
        "tokens of the rows that are left go to the wrong rows",
        "test_sampler.py::test_logprobs_are_those_of_the_training_forward[llama-1.0]",
    ),
    Mutant(
        "common.py",
        "            cache.reorder_cache(prompt)\n",
        "            cache.batch_repeat_interleave(num_generations)\n",
        "a cache of states cannot be copied so",
        "test_families.py::test_states_instead_of_keys",
    ),
    Mutant(
        "common.py",
        "is_first_iteration=t == 0",
        "is_first_iteration=False",
        "Mamba would not be told what is padding in the prompts",
        "test_families.py::test_states_instead_of_keys",
    ),
    Mutant(
        "common.py",
        "check(logits, own.flatten(0, 1)[noise - 2])",
        "check(logits, logits)",
        "a model whose padding or cache is wrong is not refused",
        "test_families.py::test_what_is_not_right_is_refused",
    ),
    Mutant(
        "common.py",
        "check(head_logits(model, outputs.last_hidden_state)[mask > 0], own[mask > 0])",
        "head_logits(model, outputs.last_hidden_state)",
        "a model whose head is no plain product is not refused",
        "test_families.py::test_what_is_not_right_is_refused",
    ),
    Mutant(
        "common.py",
        "cache.reorder_cache(unfinished)",
        "cache.reorder_cache(torch.arange(len(unfinished)))",
        "rows that are left go on with the keys of those that have ended",
        "test_sampler.py::test_logprobs_are_those_of_the_training_forward[llama-1.0]",
    ),
    Mutant(
        "common.py",
        "    return ids[: end + 1]",
        "    return ids[:end] or ids",
        "EOS is no action: it is cut off",
        "test_sampler.py::test_logprobs_are_those_of_the_training_forward[gemma2-1.0]",
    ),
    Mutant(
        "common.py",
        "    eos_ids = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}\n    eos_ids |= set(configured if isinstance(configured, list) else [configured])\n",
        "    eos_ids = {tokenizer.eos_token_id}\n",
        "only the tokenizer's EOS ends a completion (trl#7039)",
        "test_data.py::test_text_rows_end_once_where_the_tokenizer_has_a_chat_template[yo]",
    ),
    Mutant(
        "common.py",
        "    model.eval()\n",
        "    model.train(trainable)\n",
        "dropout stays on",
        "test_invariance.py::test_logprobs_depend_on_neither_padding_nor_order[gpt2]",
    ),
    Mutant(
        "common.py",
        "logits = torch.tanh(logits / cap) * cap",
        "logits = logits.clamp(-cap, cap)",
        "the cap of Gemma 2's logits is lost",
        "test_math.py::test_token_logprobs[gemma2-1.0]",
    ),
    Mutant(
        "grpo.py",
        "masks = [[0] * len(p) + [1] * len(c) for p, c in zip(prompts, completions)]",
        "masks = [[0] * len(p) + [1] * (len(c) - 1) + [0] for p, c in zip(prompts, completions)]",
        "the last token, EOS, is masked out, so that stopping is never trained (nanochat, trl#1623)",
        "test_math.py::test_token_logprobs[llama-1.0]",
    ),
    Mutant(
        "grpo.py",
        "masks = [[0] * len(p) + [1] * len(c) for p, c in zip(prompts, completions)]",
        "masks = [[1] * len(p) + [1] * len(c) for p, c in zip(prompts, completions)]",
        "prompt tokens count as the policy's own",
        "test_math.py::test_token_logprobs[llama-1.0]",
    ),
    Mutant(
        "grpo.py",
        '"attention_mask": pad_rows([[1] * (len(ids) - 1) for ids in sequences], device),',
        '"attention_mask": pad_rows([[int(i != 0) for i in ids[:-1]] for ids in sequences], device),',
        "the mask comes from ids, and hides what has PAD's id (tiny-grpo)",
        "test_math.py::test_token_logprobs[llama-1.0]",
    ),
    Mutant(
        "grpo.py",
        '"targets": pad_rows([ids[1:] for ids in sequences], device),',
        '"targets": pad_rows([ids[:-1] for ids in sequences], device),',
        "no shift: a token's log-prob is read where it is already known",
        "test_math.py::test_token_logprobs[llama-1.0]",
    ),
    Mutant(
        "common.py",
        "result[cells] = values[: len(rows)]",
        "result[cells] = values[: len(rows)].flip(0)",
        "micro-batches are put back in the wrong rows",
        "test_invariance.py::test_results_do_not_depend_on_the_micro_batch_budget[llama]",
    ),
    Mutant(
        "common.py",
        "is_uneven = length < 0.9 * longest and tokens > SMALL_BATCH",
        "is_uneven = False",
        "micro-batches of which half is padding",
        "test_invariance.py::test_micro_batches_hold_rows_of_about_one_length",
    ),
    Mutant(
        "common.py",
        'generator(seed, "shuffle", epoch)',
        'generator(seed, "shuffle")',
        "every epoch has the same order",
        "test_data.py::test_stream_is_another_order_in_each_epoch_and_for_each_seed",
    ),
    Mutant(
        "ppo.py",
        "done = max(0, step - args.warmup_steps) / max(1, steps - args.warmup_steps)",
        "done = max(0, step - args.warmup_steps) / steps",
        "the learning rate does not go towards 0 at the last step",
        "test_scripts.py::test_learning_rate_schedules",
    ),
    Mutant(
        "common.py",
        "ends = [len(ids) - 1]\n",
        "ends = [len(ids) - 2]\n",
        "a score is read at the token before the last",
        "test_rewards.py::test_score_is_read_at_the_last_token_by_length[1]",
    ),
    Mutant(
        "common.py",
        "return ids[:-1] if is_cut and ids[-1] == end_id else ids",
        "return ids",
        "a completion that was cut is scored with an end of turn",
        "test_rewards.py::test_another_tokenizer_is_given_the_text[False]",
    ),
    Mutant(
        "common.py",
        "math.nan if value is None else float(value)",
        "0.0 if value is None else float(value)",
        "what the checker cannot judge counts as 0 (trl#5902)",
        "test_rewards.py::test_checker_is_given_texts_columns_and_finished",
    ),
    Mutant(
        "sft.py",
        'batch["weights"] = batch["mask"] / batch["mask"].sum()',
        'batch["weights"] = batch["attention_mask"] / batch["mask"].sum()\n        batch["mask"] = batch["attention_mask"]',
        "the loss covers the prompt",
        "test_scripts.py::test_sft_trains_each_completion_once_and_no_prompt",
    ),
    Mutant(
        "sft.py",
        'loss = sft_loss(mb_logprobs, mb["weights"])',
        'loss = sft_loss(mb_logprobs, mb["mask"] / mb["mask"].sum())',
        "each micro-batch has a denominator of its own: a mean of means (trl#2175)",
        "test_scripts.py::test_training_does_not_depend_on_the_micro_batches[sft]",
    ),
    Mutant(
        "sft.py",
        "math.ceil(args.epochs * len(examples) / args.batch_size)",
        "args.epochs * len(examples) // args.batch_size",
        "the last batch, a smaller one, is dropped",
        "test_scripts.py::test_sft_trains_each_completion_once_and_no_prompt",
    ),
    Mutant(
        "sft.py",
        'totals["padded_tokens"] += mb["inputs"].numel()',
        'totals["padded_tokens"] += mb["attention_mask"].sum()',
        "padding that is logged is always 0",
        "test_padding.py::test_padding_is_the_share_of_what_the_update_computed[sft]",
    ),
    Mutant(
        "sft.py",
        "chunk = 40_000_000 // model.config.get_text_config().vocab_size\n",
        "chunk = 40_000_000 // model.config.get_text_config().vocab_size\n    hidden = hidden.detach() if len(targets) > chunk else hidden\n",
        "no gradient comes back through a softmax in chunks",
        "test_math.py::test_gradient_of_token_logprobs_is_the_dense_one[llama-False]",
    ),
    Mutant(
        "reward_model.py",
        "difference = chosen_scores - rejected_scores\n",
        "difference = rejected_scores - chosen_scores\n",
        "chosen and rejected are swapped",
        "test_math.py::test_bradley_terry_loss[None]",
    ),
    Mutant(
        "reward_model.py",
        "difference = difference - margin",
        "difference = difference + margin",
        "the margin is given to the rejected one",
        "test_math.py::test_bradley_terry_loss[0.7]",
    ),
    Mutant(
        "reward_model.py",
        'last = batch["attention_mask"].sum(1) - 1',
        'last = batch["attention_mask"].shape[1] - 1 + 0 * batch["attention_mask"].sum(1)',
        "the score is read at the last column, which is padding (trl#2778)",
        "test_math.py::test_sequence_scores[llama-0]",
    ),
    Mutant(
        "reward_model.py",
        "return (pair_weights * (losses + centring)).sum()",
        "return (losses + centring).mean()",
        "a mean of means over micro-batches of pairs",
        "test_scripts.py::test_training_does_not_depend_on_the_micro_batches[reward_model]",
    ),
    Mutant(
        "rejection_sampling.py",
        "best = rewards.masked_fill(rewards.isnan(), -torch.inf).argmax(1)",
        "best = rewards.masked_fill(rewards.isnan(), torch.inf).argmin(1)",
        "the worst completion of each prompt is kept",
        "test_rejection_sampling.py::test_worked_example_of_the_book",
    ),
    Mutant(
        "rejection_sampling.py",
        "flat.sort(descending=True, stable=True)",
        "flat.sort(stable=True)",
        "the worst k of all are kept",
        "test_rejection_sampling.py::test_worked_example_of_the_book",
    ),
    Mutant(
        "rejection_sampling.py",
        "flat = flat.masked_fill(flat.isnan(), -torch.inf)",
        "flat = flat.masked_fill(flat.isnan(), 0.0)",
        "what the checker cannot judge counts as 0 (trl#5902)",
        "test_rejection_sampling.py::test_ties_and_missing_scores",
    ),
    Mutant(
        "rejection_sampling.py",
        "math.comb(i, N - 1)",
        "math.comb(i + 1, N - 1)",
        "best-of-N is off by one subset",
        "test_rejection_sampling.py::test_best_of_n_against_all_subsets",
    ),
    Mutant(
        "rejection_sampling.py",
        'rng=generator(args.seed, "sample", iteration, first)',
        'rng=generator(args.seed, "sample", iteration)',
        "every chunk of prompts draws with the same noise",
        "test_rejection_sampling.py::test_chunks_of_prompts_draw_from_streams_of_their_own",
    ),
    Mutant(
        "rejection_sampling.py",
        "row_golds = golds[i * N : (i + 1) * N]",
        "row_golds = golds[:N]",
        "rollouts hold the first prompt's verdicts for all",
        "test_rejection_sampling.py::test_rollouts_hold_each_completions_own_numbers",
    ),
    Mutant(
        "rejection_sampling.py",
        "logprobs = batch_token_logprobs(policy, batch, args, autocast, args.temperature)\n    reference",
        "logprobs = batch_token_logprobs(policy, batch, args, autocast)\n    reference",
        "the temperature is missing from the KL of an evaluation",
        "test_rejection_sampling.py::test_temperature_is_of_sampling_and_of_the_kl_and_not_of_training",
    ),
    Mutant(
        "ppo.py",
        "return -kl_coef * kl + scores[:, None] * is_last",
        "return kl_coef * kl + scores[:, None] * is_last",
        "the KL is rewarded (TinyZero)",
        "test_math.py::test_token_rewards",
    ),
    Mutant(
        "ppo.py",
        "is_last = (tokens_from_here == 1) & mask.bool()",
        "is_last = ((tokens_from_here == 1) & mask.bool()).roll(1, 1)",
        "the score falls on the first PAD (trl#3750)",
        "test_math.py::test_token_rewards",
    ),
    Mutant(
        "ppo.py",
        "delta = rewards[:, t] + gamma * next_value - values[:, t]",
        "delta = rewards[:, t] + gamma * values[:, t] - next_value",
        "GAE is off by one: V_t and V_t+1 are swapped",
        "test_math.py::test_gae[1.0-0.95]",
    ),
    Mutant(
        "ppo.py",
        "next_value = values[:, t] * mask[:, t]",
        "next_value = values[:, t]",
        "GAE bootstraps from a value past the end",
        "test_math.py::test_gae[1.0-0.95]",
    ),
    Mutant(
        "ppo.py",
        "advantages[:, t] = (delta + gamma * gae_lambda * next_advantage) * mask[:, t]",
        "advantages[:, t] = delta + gamma * gae_lambda * next_advantage",
        "GAE runs on through padding",
        "test_math.py::test_gae[1.0-0.95]",
    ),
    Mutant(
        "ppo.py",
        "returns = (advantages + values) * mask",
        "returns = (advantages - values) * mask",
        "returns are advantages less values",
        "test_math.py::test_gae[1.0-0.95]",
    ),
    Mutant(
        "ppo.py",
        "log_ratio = (logprobs - old_logprobs).clamp(max=20)",
        "log_ratio = (old_logprobs - logprobs).clamp(max=20)",
        "the ratio is inverted",
        "test_math.py::test_policy_loss[0.2-None]",
    ),
    Mutant(
        "ppo.py",
        "loss = (weights * torch.max(pg_loss1, pg_loss2)).sum()",
        "loss = (weights * pg_loss1).sum()",
        "the clip is dropped",
        "test_math.py::test_policy_loss[0.2-None]",
    ),
    Mutant(
        "ppo.py",
        "loss = (weights * torch.max(pg_loss1, pg_loss2)).sum()",
        "loss = (weights * torch.min(pg_loss1, pg_loss2)).sum()",
        "the clip is on the wrong side, the optimistic one",
        "test_math.py::test_policy_loss[0.2-None]",
    ),
    Mutant(
        "ppo.py",
        "log_ratio = (logprobs - old_logprobs).clamp(max=20)",
        "log_ratio = logprobs - old_logprobs",
        "a ratio that overflows makes infinity times 0",
        "test_math.py::test_policy_loss_of_a_ratio_beyond_float32[1000.0-2.0-1.0--2.6-True]",
    ),
    Mutant(
        "ppo.py",
        "clipped_values = old_values + (values - old_values)",
        "clipped_values = values + (old_values - values)",
        "the value clip is around the new value",
        "test_math.py::test_value_loss[0.2]",
    ),
    Mutant(
        "ppo.py",
        "variance = masked_mean((x - mean) ** 2, mask)",
        "variance = ((x - mean) ** 2).mean()",
        "whitening counts padding",
        "test_math.py::test_masked_whiten[0.0001-True]",
    ),
    Mutant(
        "ppo.py",
        '        batch["advantages"] = masked_whiten(advantages, mask)\n',
        '        batch["advantages"] = masked_whiten(advantages, mask)\n        batch["returns"] = (batch["advantages"] + batch["old_values"]) * mask\n',
        "returns are taken after whitening",
        "test_scripts.py::test_ppo_pays_for_missing_eos_and_learns_values",
    ),
    Mutant(
        "ppo.py",
        "lambda mb: token_logprobs_and_entropy(model, mb, args.temperature)",
        "lambda mb: token_logprobs_and_entropy(model, mb)",
        "the temperature is missing from the old and the reference's log-probs",
        "test_scripts.py::test_ppo_starts_at_ratio_one_and_kl_zero[0.7]",
    ),
    Mutant(
        "ppo.py",
        "                        policy, mb, args.temperature\n",
        "                        policy, mb\n",
        "the temperature is missing from the log-probs that are trained (trl#4159)",
        "test_scripts.py::test_ppo_starts_at_ratio_one_and_kl_zero[0.7]",
    ),
    Mutant(
        "ppo.py",
        "reference = load_policy(args.model, device) if args.kl_coef else None",
        "reference = policy if args.kl_coef else None",
        "the reference is not frozen: it is the policy",
        "test_scripts.py::test_ppo_starts_at_ratio_one_and_kl_zero[1.0]",
    ),
    Mutant(
        "ppo.py",
        'minibatch["weights"] = minibatch["mask"] / minibatch["mask"].sum()\n            for mb in micro_batches(minibatch, args.micro_batch_tokens):\n',
        'for mb in micro_batches(minibatch, args.micro_batch_tokens):\n                mb["weights"] = mb["mask"] / mb["mask"].sum()\n',
        "each micro-batch has a denominator of its own: a mean of means",
        "test_scripts.py::test_ppo_does_not_depend_on_the_micro_batches",
    ),
    Mutant(
        "ppo.py",
        "(args.value_coef * vf_loss).backward()",
        "(-args.value_coef * vf_loss).backward()",
        "values are driven away from the returns",
        "test_scripts.py::test_ppo_pays_for_missing_eos_and_learns_values",
    ),
    Mutant(
        "ppo.py",
        '            generator(args.seed, "sample", step),\n',
        '            generator(args.seed, "sample"),\n',
        "every step draws with the same noise",
        "test_scripts.py::test_every_step_draws_afresh[ppo]",
    ),
    Mutant(
        "ppo.py",
        "reward = completion_score if finished else completion_score - args.missing_eos_penalty",
        "reward = completion_score - args.missing_eos_penalty if finished else completion_score",
        "ending in EOS costs what not ending should (trl#6802)",
        "test_scripts.py::test_ppo_pays_for_missing_eos_and_learns_values",
    ),
    Mutant(
        "ppo.py",
        'if not any(math.isnan(rollout["score"]) for rollout in group):',
        "if True:",
        "a group that was not judged is trained on",
        "test_scripts.py::test_nothing_that_was_not_judged_is_trained[ppo]",
    ),
    Mutant(
        "grpo.py",
        '("_greedy", 1, 0.0)',
        '("_greedy", 1, 1.0)',
        "what is called greedy is sampled",
        "test_group.py::test_pass_at_g",
    ),
    Mutant(
        "grpo.py",
        "first = i * args.num_generations\n",
        "first = i\n",
        "samples.jsonl pairs completions with the numbers of others",
        "test_group.py::test_pass_at_g",
    ),
    Mutant(
        "grpo.py",
        'numbers["kl"] = (logprobs - ref_logprobs).sum(1)',
        'numbers["kl"] = (logprobs + ref_logprobs).sum(1)',
        "the sign of the reference in the KL of an evaluation",
        "test_group.py::test_without_kl_a_reference_is_there_for_evaluations_only[grpo]",
    ),
    Mutant(
        "grpo.py",
        'mb_old_logprobs = mb.get("old_logprobs", mb_logprobs.detach())',
        'mb_old_logprobs = mb.get("old_logprobs", mb_logprobs)',
        "the ratio's own denominator has a gradient, so that nothing is learnt from a single update",
        "test_group.py::test_a_budget_that_cuts_groups_apart_changes_nothing[grpo-flags2]",
    ),
    Mutant(
        "grpo.py",
        "examples = [example for example in examples for _ in range(args.num_generations)]\n    member",
        "examples = [example for _ in range(args.num_generations) for example in examples]\n    member",
        "rewards are tiled, not interleaved: completions are scored for other prompts (nanoGRPO)",
        "test_group.py::test_a_group_that_cannot_be_judged_is_left_out_whole",
    ),
    Mutant(
        "grpo.py",
        "groups.std(1, keepdim=True)",
        "groups.std(1, keepdim=True, correction=0)",
        "the group's standard deviation is the biased one",
        "test_identities.py::test_dividing_by_the_deviation_of_the_group",
    ),
    Mutant(
        "grpo.py",
        "return torch.expm1(-x) + x",
        "return torch.expm1(x) - x",
        "k3 of the reciprocal ratio (RLHF book)",
        "test_identities.py::test_where_a_kl_loss_rests[k3-k3]",
    ),
    Mutant(
        "grpo.py",
        'loss = loss + args.kl_coef * (mb["weights"] * kl_loss).sum()',
        'loss = loss - args.kl_coef * (mb["weights"] * kl_loss).sum()',
        "the KL loss is subtracted (TinyZero)",
        "test_group.py::test_the_kl_pulls_back_to_the_reference[kl1]",
    ),
    Mutant(
        "grpo.py",
        "rewards = rewards - args.kl_coef * kl\n",
        "rewards = rewards + args.kl_coef * kl\n",
        "the KL in the reward has the wrong sign (RLHF book)",
        "test_group.py::test_the_kl_pulls_back_to_the_reference[kl0]",
    ),
    Mutant(
        "grpo.py",
        "return mask / mask.sum().clamp(min=1)",
        "return mask / mask.numel()",
        "the token mean counts padding",
        "test_identities.py::test_the_mean_over_the_tokens_of_a_batch",
    ),
    Mutant(
        "grpo.py",
        'finished = torch.tensor([rollout["finished"] for rollout in rollouts], device=device)',
        'finished = torch.tensor([not rollout["finished"] for rollout in rollouts], device=device)',
        "--mask-truncated masks the completions that ended",
        "test_group.py::test_truncated_completions_are_masked_and_still_counted",
    ),
    Mutant(
        "grpo.py",
        "        epsilon_high = epsilon\n",
        "        pass\n    epsilon_high = epsilon\n",
        "--epsilon-high does nothing",
        "test_group.py::test_grpo_loss[0.28-kl0-sequence]",
    ),
    Mutant(
        "rloo.py",
        "return (groups - others_mean).flatten()",
        "return (groups - groups.mean(1, keepdim=True)).flatten()",
        "the baseline includes the completion itself",
        "test_identities.py::test_leave_one_out_and_plain_reinforce_are_unbiased",
    ),
    Mutant(
        "rloo.py",
        "loss = (weights * -advantages * ratio",
        "loss = (weights * advantages * ratio",
        "the gradient descends the reward",
        "test_identities.py::test_leave_one_out_and_plain_reinforce_are_unbiased",
    ),
    Mutant(
        "rloo.py",
        'kl = (batch["old_logprobs"] - ref_logprobs).sum(1)',
        'kl = (batch["old_logprobs"] - ref_logprobs).mean(1)',
        "the KL is averaged over tokens and padding",
        "test_group.py::test_rloo_step_is_the_formula[leave-one-out]",
    ),
    Mutant(
        "rloo.py",
        'kl = (batch["old_logprobs"] - ref_logprobs).sum(1)',
        'kl = (ref_logprobs - batch["old_logprobs"]).sum(1)',
        "the KL has the wrong direction",
        "test_group.py::test_rloo_step_is_the_formula[leave-one-out]",
    ),
    Mutant(
        "rloo.py",
        "~clipped * logprobs).sum()",
        "logprobs).sum()",
        "the clip is dropped",
        "test_group.py::test_reinforce_loss_of_a_ratio_that_overflows_is_finite",
    ),
    Mutant(
        "rloo.py",
        'minibatch["weights"] = minibatch["mask"] / len(minibatch_rows)',
        'minibatch["weights"] = minibatch["mask"] / len(batch["inputs"])',
        "the denominator is that of the whole rollout, not of the minibatch",
        "test_group.py::test_each_minibatch_has_its_own_normaliser[rloo-flags0]",
    ),
    Mutant(
        "dpo.py",
        "h = chosen_rewards - rejected_rewards - margin",
        "h = rejected_rewards - chosen_rewards - margin",
        "chosen and rejected are swapped",
        "test_dpo.py::test_preference_loss[0.1-sigmoid]",
    ),
    Mutant(
        "dpo.py",
        "    logps = logprobs.sum(1)  # (2B,)\n",
        '    logps = logprobs.sum(1) / batch["mask"].sum(1).clamp(min=1)\n',
        "log-probs are averaged, not summed",
        "test_dpo.py::test_pair_losses[sigmoid]",
    ),
    Mutant(
        "dpo.py",
        "return values[0::2], values[1::2]",
        "return values.chunk(2)",
        "the halves of a batch are taken for chosen and rejected",
        "test_dpo.py::test_pair_batch",
    ),
    Mutant(
        "dpo.py",
        "rejected_rewards = beta * (rejected_logps - ref_rejected_logps)",
        "rejected_rewards = beta * rejected_logps",
        "the reference of the rejected ones is left out",
        "test_dpo.py::test_preference_loss[0.1-sigmoid]",
    ),
    Mutant(
        "dpo.py",
        "F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)",
        "F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)",
        "label smoothing of robust DPO without its divisor",
        "test_dpo.py::test_preference_loss[0.1-sigmoid]",
    ),
    Mutant(
        "dpo.py",
        "loss = (mb_weights * losses).sum()",
        "loss = losses.mean()",
        "a mean of means over micro-batches of pairs",
        "test_dpo.py::test_micro_batches_change_nothing",
    ),
    Mutant(
        "common.py",
        '            set_optimizer_state_dict(self.models, self.optimizer, state["optimizer"], options=WHOLE)\n',
        "",
        "--resume forgets the optimiser's state",
        "test_resume.py::test_saved_flags_hold_and_the_command_line_wins",
    ),
    Mutant(
        "common.py",
        '[row for row in rows if row["step"] <= step]',
        "rows",
        "lines of metrics.jsonl are doubled after --resume",
        "test_resume.py::test_a_killed_run_ends_as_an_undisturbed_one[sft]",
    ),
    Mutant(
        "common.py",
        "if is_interrupted or is_last or is_due(",
        "if is_last or is_due(",
        "Ctrl-C ends the run without saving",
        "test_resume.py::test_signals_finish_the_step_and_save[sft-15]",
    ),
    Mutant(
        "sft.py",
        "if not grad_norm.isfinite():",
        "if grad_norm > 1e30:",
        "an update with NaN is applied",
        "test_resume.py::test_a_gradient_that_is_not_finite_stops_the_run",
    ),
    Mutant(
        "ppo.py",
        "        first = step * args.prompts_per_step\n",
        "        first = step\n",
        "a step takes most of the prompts of the one before",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        'generator(args.seed, "minibatch", step, epoch)',
        'generator(args.seed, "minibatch", step)',
        "every epoch cuts the same minibatches",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        '        ("", args.num_generations, args.temperature),\n',
        '        ("", args.num_generations, 1.0),\n',
        "evaluations sample at temperature 1",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        "            temperature=args.temperature,\n            eos_ids=eos_ids,\n            rng=rng,\n",
        "            temperature=1.0,\n            eos_ids=eos_ids,\n            rng=rng,\n",
        "rollouts are sampled at temperature 1",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "grpo.py",
        "        first = step * args.prompts_per_step\n",
        "        first = step\n",
        "a step takes most of the prompts of the one before",
        "test_steps.py::test_grpo[kl3-loss]",
    ),
    Mutant(
        "grpo.py",
        'generator(args.seed, "minibatch", step, epoch)',
        'generator(args.seed, "minibatch", step)',
        "every epoch cuts the same minibatches",
        "test_steps.py::test_grpo[kl3-loss]",
    ),
    Mutant(
        "grpo.py",
        '        ("", args.num_generations, args.temperature),\n',
        '        ("", args.num_generations, 1.0),\n',
        "evaluations sample at temperature 1",
        "test_steps.py::test_grpo[kl3-loss]",
    ),
    Mutant(
        "grpo.py",
        "            temperature=args.temperature,\n            eos_ids=eos_ids,\n            rng=rng,\n",
        "            temperature=1.0,\n            eos_ids=eos_ids,\n            rng=rng,\n",
        "rollouts are sampled at temperature 1",
        "test_steps.py::test_grpo[kl3-loss]",
    ),
    Mutant(
        "rloo.py",
        "        first = step * args.prompts_per_step\n",
        "        first = step\n",
        "a step takes most of the prompts of the one before",
        "test_steps.py::test_rloo[leave-one-out]",
    ),
    Mutant(
        "rloo.py",
        'generator(args.seed, "minibatch", step, epoch)',
        'generator(args.seed, "minibatch", step)',
        "every epoch cuts the same minibatches",
        "test_steps.py::test_rloo[leave-one-out]",
    ),
    Mutant(
        "rloo.py",
        '        ("", args.num_generations, args.temperature),\n',
        '        ("", args.num_generations, 1.0),\n',
        "evaluations sample at temperature 1",
        "test_steps.py::test_rloo[leave-one-out]",
    ),
    Mutant(
        "rloo.py",
        "            temperature=args.temperature,\n            eos_ids=eos_ids,\n            rng=rng,\n",
        "            temperature=1.0,\n            eos_ids=eos_ids,\n            rng=rng,\n",
        "rollouts are sampled at temperature 1",
        "test_steps.py::test_rloo[leave-one-out]",
    ),
    Mutant(
        "sft.py",
        "        first = step * args.batch_size\n",
        "        first = step\n",
        "a step takes most of the rows of the one before",
        "test_steps.py::test_sft[chat-all]",
    ),
    Mutant(
        "reward_model.py",
        "        first = step * args.batch_size\n",
        "        first = step\n",
        "a step takes most of the rows of the one before",
        "test_steps.py::test_reward_model[0.3]",
    ),
    Mutant(
        "dpo.py",
        "        first = step * args.batch_size\n",
        "        first = step\n",
        "a step takes most of the rows of the one before",
        "test_steps.py::test_dpo[sft]",
    ),
    Mutant(
        "rejection_sampling.py",
        "        first = (step - first_step) * args.batch_size\n",
        "        first = max(0, step - first_step - 1) * args.batch_size\n",
        "an iteration's first batch is trained twice, its last one not at all",
        "test_steps.py::test_rejection_sampling[top-k]",
    ),
    Mutant(
        "ppo.py",
        '        batch["advantages"] = masked_whiten(advantages, mask)\n',
        '        batch["advantages"] = advantages\n',
        "advantages are not whitened",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        "rewards = masked_whiten(rewards, mask, shift_mean=False)",
        "rewards = masked_whiten(rewards, mask)",
        "whitening moves the mean of the rewards",
        "test_steps.py::test_ppo[whitened]",
    ),
    Mutant(
        "ppo.py",
        "        mean_reward = rewards.sum(1).mean()\n",
        "        mean_reward = masked_mean(rewards, mask)\n",
        "the reward that is logged is one token's",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        'scores = torch.tensor([rollout["score"] for rollout in rollouts], device=device)  # (B,)',
        'scores = torch.tensor([rollout["reward"] for rollout in rollouts], device=device)  # (B,)',
        "the score that is logged has the price of missing EOS in it",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        '            torch.tensor([rollout["reward"] for rollout in rollouts], device=device),\n',
        "            scores,\n",
        "missing EOS costs nothing",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        '(batch["old_logprobs"] - batch["ref_logprobs"]).sum(1).mean()',
        'masked_mean(batch["old_logprobs"] - batch["ref_logprobs"], mask)',
        "the KL that is logged is a mean over tokens",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        'explained_variance(batch["returns"], batch["old_values"], mask)',
        'explained_variance(batch["advantages"] + batch["old_values"], batch["old_values"], mask)',
        "explained variance is of whitened returns",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        '            "entropy": totals["entropy"] / trained_tokens,\n',
        '            "entropy": totals["entropy"] / mask.sum(),\n',
        "entropy is summed over epochs",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        '            "clip_fraction": totals["clipped"] / trained_tokens,\n',
        '            "clip_fraction": totals["clipped"] / mask.sum(),\n',
        "the clip fraction is summed over epochs",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        '            "loss": (totals["policy_loss"] + args.value_coef * totals["value_loss"]) / updates,\n',
        '            "loss": (totals["policy_loss"] + totals["value_loss"]) / updates,\n',
        "the loss that is logged is not what is minimised",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        '            "loss/value": totals["value_loss"] / updates,\n',
        '            "loss/value": args.value_coef * totals["value_loss"] / updates,\n',
        "the value loss that is logged has its weight in it",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        '            "completion_length": mask.sum(1).float().mean(),\n',
        '            "completion_length": batch["attention_mask"].sum(1).float().mean(),\n',
        "prompts count in the length",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        '            "grad_norm": totals["grad_norm"] / updates,\n',
        '            "grad_norm": totals["grad_norm"] / args.update_epochs,\n',
        "norms are summed over minibatches",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        'rewards, batch["old_values"], mask, args.gamma, args.gae_lambda\n',
        'rewards, batch["old_values"], mask, args.gae_lambda, args.gamma\n',
        "gamma and lambda are swapped",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        '            batch["ref_logprobs"] = batch_logprobs(reference, batch, args, autocast)\n',
        '            batch["ref_logprobs"] = batch_logprobs(policy, batch, args, autocast)\n',
        "the reference's log-probs are the policy's",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "grpo.py",
        "kl_loss * (mb_logprobs - mb_old_logprobs).clamp(max=20).exp()",
        "kl_loss * (mb_logprobs - mb_old_logprobs).detach().clamp(max=20).exp()",
        "--kl-ratio without the gradient of the ratio",
        "test_steps.py::test_grpo[kl-ratio]",
    ),
    Mutant(
        "ppo.py",
        "learning_rate = scheduled_learning_rate(step, args.steps, args)",
        "learning_rate = scheduled_learning_rate(step + 1, args.steps, args)",
        "a step has the next one's learning rate",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        '            "learning_rate": learning_rate,\n',
        '            "learning_rate": args.learning_rate,\n',
        "the learning rate that is logged is the peak",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        '    models = nn.ModuleDict({"policy": policy, "value_model": value_model})\n',
        '    models = nn.ModuleDict({"policy": policy})\n',
        "the value model is never stepped",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        "eps=1e-5,",
        "eps=1e-8,",
        "Adam's epsilon is PyTorch's",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        '                    mb["returns"],\n',
        '                    mb["old_values"],\n',
        "values are trained on the values before",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        '                    mb["old_logprobs"],\n                    mb["advantages"],\n',
        '                    mb["ref_logprobs"],\n                    mb["advantages"],\n',
        "the ratio is to the reference",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        'minibatch["weights"] = minibatch["mask"] / minibatch["mask"].sum()',
        'minibatch["weights"] = minibatch["mask"] / batch["mask"].sum()',
        "the denominator is that of the whole rollout, not of the minibatch",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        'minibatch["weights"] = minibatch["mask"] / minibatch["mask"].sum()',
        'minibatch["weights"] = minibatch["mask"] / minibatch["mask"].sum(1, keepdim=True) / len(minibatch_rows)',
        "the loss is a mean per completion, not per token",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        "(args.value_coef * vf_loss).backward()",
        "vf_loss.backward()",
        "the value loss has no weight",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        "                    epsilon_high=args.epsilon_high,\n",
        "",
        "--epsilon-high does nothing",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        "                    args.value_clip,\n",
        "                    args.epsilon,\n",
        "values are clipped by the policy's range",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        "            value_grad_norm = clip_gradients(value_model, args.max_grad_norm)\n",
        "            value_grad_norm = clip_gradients(value_model, 0)\n",
        "the value model's gradient is not clipped",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        "            optimizer.zero_grad()\n",
        "",
        "gradients pile up from minibatch to minibatch",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        '                if totals["updates"] == 0:\n',
        "                if epoch == 0:\n",
        "the ratio that should be 1 is read after updates",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        'ratio = (mb_logprobs - mb["old_logprobs"]).detach().exp()',
        "ratio = (mb_logprobs - mb_logprobs).detach().exp()",
        "the ratio is compared with itself",
        "test_steps.py::test_ratio_max_dev[ppo]",
    ),
    Mutant(
        "ppo.py",
        "order.tensor_split(args.num_minibatches)",
        "order.split(len(order) // args.num_minibatches)",
        "what the minibatches leave over is one more",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        "reward = completion_score if finished else completion_score - args.missing_eos_penalty",
        "reward = completion_score if finished else -args.missing_eos_penalty",
        "the penalty stands instead of the score",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        "is_last = (tokens_from_here == 1) & mask.bool()",
        "is_last = (tokens_from_here == tokens_from_here.amax(1, keepdim=True)) & (tokens_from_here > 0) & mask.bool()",
        "the score falls on the first token",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "ppo.py",
        "delta = rewards[:, t] + gamma * next_value - values[:, t]",
        "delta = rewards[:, t] + next_value - values[:, t]",
        "the next value is not discounted",
        "test_steps.py::test_ppo[all]",
    ),
    Mutant(
        "grpo.py",
        "                            reference, mb, args.temperature\n",
        "                            reference, mb\n",
        "the reference in a KL loss has no temperature",
        "test_steps.py::test_grpo[kl3-loss]",
    ),
    Mutant(
        "grpo.py",
        "is_stepped_on_once = args.update_epochs * args.num_minibatches == 1",
        "is_stepped_on_once = args.num_minibatches == 1",
        "old log-probs are the update's own in later epochs, too",
        "test_steps.py::test_grpo[kl2-loss]",
    ),
    Mutant(
        "grpo.py",
        '                    totals["kl"] += (mb_old_logprobs - mb_ref_logprobs).sum()\n',
        '                    totals["kl"] += (mb_logprobs.detach() - mb_ref_logprobs).sum()\n',
        "the KL that is logged is that of later policies on old samples",
        "test_steps.py::test_grpo[kl3-loss]",
    ),
    Mutant(
        "grpo.py",
        'totals["kl"] / (args.update_epochs * len(rollouts))',
        'totals["kl"] / len(rollouts)',
        "the KL that is logged is summed over epochs",
        "test_steps.py::test_grpo[kl3-loss]",
    ),
    Mutant(
        "rloo.py",
        "is_stepped_on_once = args.update_epochs * args.num_minibatches == 1",
        "is_stepped_on_once = args.num_minibatches == 1",
        "old log-probs are the update's own in later epochs, too",
        "test_steps.py::test_rloo[none]",
    ),
    Mutant(
        "rloo.py",
        '            "reward": rewards.mean(),\n',
        '            "reward": advantages.mean(),\n',
        "the reward that is logged is the advantage",
        "test_steps.py::test_rloo[leave-one-out]",
    ),
    Mutant(
        "sft.py",
        "        weight_decay=args.weight_decay,\n",
        "",
        "--weight-decay is AdamW's default, 0.01",
        "test_steps.py::test_sft[text-last]",
    ),
    Mutant(
        "sft.py",
        "torch.optim.AdamW(",
        "torch.optim.Adam(",
        "weight decay is a gradient",
        "test_steps.py::test_sft[chat-last]",
    ),
    Mutant(
        "common.py",
        "max_norm or math.inf",
        "max_norm or 1.0",
        "--max-grad-norm 0 clips at 1",
        "test_steps.py::test_sft[text-last]",
    ),
    Mutant(
        "sft.py",
        '        optimizer.param_groups[0]["lr"] = learning_rate\n',
        "",
        "the schedule is logged and not used",
        "test_steps.py::test_sft[chat-last]",
    ),
    Mutant(
        "sft.py",
        'loss = sft_loss(logprobs, batch["mask"] / batch["mask"].sum())',
        'loss = sft_loss(logprobs, batch["mask"] / batch["mask"].sum(1, keepdim=True)) / len(examples)',
        "the held-out loss is a mean over rows",
        "test_steps.py::test_sft[chat-last]",
    ),
    Mutant(
        "sft.py",
        "            turns = turns[-1:]\n",
        "            turns = turns[:1]\n",
        "the first assistant turn is trained",
        "test_steps.py::test_sft[chat-last]",
    ),
    Mutant(
        "sft.py",
        "        mask += [0] * (len(prompt_ids) - len(ids)) + [1] * len(completion_ids)\n",
        "        mask = [0] * len(prompt_ids) + [1] * len(completion_ids)\n",
        "of all assistant turns the last one alone is trained",
        "test_steps.py::test_sft[chat-all]",
    ),
    Mutant(
        "sft.py",
        "        optimizer.zero_grad()\n",
        "",
        "gradients pile up from step to step",
        "test_steps.py::test_sft[chat-last]",
    ),
    Mutant(
        "sft.py",
        "learning_rate = scheduled_learning_rate(step, steps, args)",
        "learning_rate = scheduled_learning_rate(step, steps + 1, args)",
        "the learning rate is that of a longer run",
        "test_steps.py::test_sft[chat-last]",
    ),
    Mutant(
        "reward_model.py",
        "std = 1 / math.sqrt(model.score.in_features + 1)",
        "std = 1 / (model.score.in_features + 1)",
        "the head's variance is taken for its deviation",
        "test_steps.py::test_reward_model[0.3]",
    ),
    Mutant(
        "reward_model.py",
        "std = 1 / math.sqrt(model.score.in_features + 1)",
        "std = 1 / math.sqrt(model.score.out_features + 1)",
        "the head's deviation is of the wrong dimension",
        "test_steps.py::test_reward_model[0.3]",
    ),
    Mutant(
        "reward_model.py",
        "center_coef * (scores[better] + scores[worse]) ** 2",
        "center_coef * (scores[better] - scores[worse]) ** 2",
        "centring pulls the scores of a pair together",
        "test_steps.py::test_reward_model[0.3]",
    ),
    Mutant(
        "reward_model.py",
        'losses = bradley_terry_loss(scores[better], scores[worse], batch["margins"][better])',
        "losses = bradley_terry_loss(scores[better], scores[worse])",
        "margins of the data are not read",
        "test_steps.py::test_reward_model[0.3]",
    ),
    Mutant(
        "reward_model.py",
        "pair_weights.append(1 / (num_pairs * num_compared) if num_pairs else 0.0)",
        "pair_weights.append(1 / (num_pairs * len(sequences)) if num_pairs else 0.0)",
        "the mean is over sequences, not over prompts",
        "test_steps.py::test_reward_model[0.3]",
    ),
    Mutant(
        "reward_model.py",
        'totals["loss"] += weighted_loss(batch_scores, batch, args.loss)',
        'totals["loss"] += weighted_loss(batch_scores, batch, args.loss, args.center_coef)',
        "the held-out loss holds the centring",
        "test_steps.py::test_reward_model[0.3]",
    ),
    Mutant(
        "reward_model.py",
        'metrics["eval/score_std"] = scores.std(correction=0)',
        'metrics["eval/score_std"] = scores[::2].std(correction=0)',
        "the spread is that of the chosen ones",
        "test_steps.py::test_reward_model[0.3]",
    ),
    Mutant(
        "reward_model.py",
        "        optimizer.zero_grad()\n",
        "",
        "gradients pile up from step to step",
        "test_steps.py::test_reward_model[0.3]",
    ),
    Mutant(
        "dpo.py",
        "ref_logps += logprobs.sum(1).view(-1, 2).tolist()",
        "ref_logps += logprobs.sum(1).view(2, -1).T.tolist()",
        "the reference's log-probs go to other pairs",
        "test_steps.py::test_dpo[sigmoid]",
    ),
    Mutant(
        "dpo.py",
        "torch.full((len(completions),), 1 / len(examples), device=device)",
        "torch.full((len(completions),), 1 / len(completions), device=device)",
        "the mean is over sequences, not over pairs",
        "test_steps.py::test_dpo[sigmoid]",
    ),
    Mutant(
        "dpo.py",
        "chosen_nll, _ = of_pairs(-logps / lengths)",
        "_, chosen_nll = of_pairs(-logps / lengths)",
        "--sft-coef trains the rejected one",
        "test_steps.py::test_dpo[sft]",
    ),
    Mutant(
        "dpo.py",
        "margins = margins + (SIMPO_MARGIN if",
        "margins = 0 * margins + (SIMPO_MARGIN if",
        "simpo forgets the margins of the data",
        "test_steps.py::test_dpo[simpo]",
    ),
    Mutant(
        "dpo.py",
        "of_pairs(ref_logps / scale)",
        "of_pairs(ref_logps)",
        "ipo: a mean less a sum",
        "test_steps.py::test_dpo[ipo]",
    ),
    Mutant(
        "dpo.py",
        "        examples = add_reference(reference, examples, args, autocast)\n",
        "",
        "the reference's log-probs are missing in training, and so 0",
        "test_steps.py::test_dpo[sigmoid]",
    ),
    Mutant(
        "dpo.py",
        "chosen_logratio, rejected_logratio = of_pairs(logps - ref_logps)",
        "chosen_logratio, rejected_logratio = of_pairs((logps - ref_logps) / lengths)",
        "the log-ratio that is logged is one token's",
        "test_steps.py::test_dpo[sigmoid]",
    ),
    Mutant(
        "rejection_sampling.py",
        "golds[~rewards.isnan()].mean()",
        "golds.mean()",
        "gold is of other completions than the score beside it",
        "test_steps.py::test_rejection_sampling[top-per-prompt]",
    ),
    Mutant(
        "rejection_sampling.py",
        '"selected_score": rewards[rows, columns].mean()',
        '"selected_score": rewards[rows].nanmean()',
        "the score of what was selected is that of its prompts",
        "test_steps.py::test_rejection_sampling[top-per-prompt]",
    ),
    Mutant(
        "rejection_sampling.py",
        "stream(examples, args.seed, iteration * M, (iteration + 1) * M)",
        "stream(examples, args.seed, 0, M)",
        "every iteration has the prompts of the first",
        "test_steps.py::test_rejection_sampling[top-per-prompt]",
    ),
    Mutant(
        "rejection_sampling.py",
        "scheduled_learning_rate(step - first_step, steps, args)",
        "scheduled_learning_rate(step, steps, args)",
        "the schedule of a later iteration begins at its end",
        "test_steps.py::test_rejection_sampling[top-per-prompt]",
    ),
    Mutant(
        "rejection_sampling.py",
        "                mb_logprobs = token_logprobs(policy, mb)\n",
        "                mb_logprobs = token_logprobs(policy, mb, args.temperature)\n",
        "training is at the temperature of sampling",
        "test_steps.py::test_rejection_sampling[top-per-prompt]",
    ),
    Mutant(
        "rejection_sampling.py",
        "rewards < args.min_score, math.nan",
        "rewards <= args.min_score, math.nan",
        "a score of just --min-score is not enough",
        "test_rejection_sampling.py::test_select_per_prompt",
    ),
    Mutant(
        "rejection_sampling.py",
        "        if step == first_step:\n            metrics |= log_first\n",
        "        if step == 0:\n            metrics |= log_first\n",
        "what later iterations selected is not logged",
        "test_steps.py::test_rejection_sampling[top-per-prompt]",
    ),
    Mutant(
        "rejection_sampling.py",
        '        ("", args.num_generations, args.temperature),\n',
        '        ("", args.num_generations, 1.0),\n',
        "evaluations sample at temperature 1",
        "test_steps.py::test_rejection_sampling[top-per-prompt]",
    ),
    Mutant(
        "rejection_sampling.py",
        "reference = load_policy(args.model, policy.device)",
        "reference = policy",
        "the KL of an evaluation is from the policy itself",
        "test_steps.py::test_rejection_sampling[top-per-prompt]",
    ),
    Mutant(
        "reward_model.py",
        "is_better = (group[:, None] == group) & (labels[:, None] > labels)",
        "is_better = (group[:, None] == group) & (labels[:, None] < labels)",
        "rankings are read from the worst",
        "test_steps.py::test_reward_model_of_more_than_pairs[bradley-terry]",
    ),
    Mutant(
        "reward_model.py",
        "is_below = (group[:, None] == group) & (labels[:, None] > labels)",
        "is_below = (group[:, None] == group) & (labels[:, None] < labels)",
        "Plackett-Luce ranks from the worst",
        "test_steps.py::test_reward_model_of_more_than_pairs[plackett-luce]",
    ),
    Mutant(
        "reward_model.py",
        "is_below = (group[:, None] == group) & (labels[:, None] > labels)",
        "is_below = (group[:, None] == group) & (labels[:, None] >= labels)",
        "of equal ranks each has to beat the other",
        "test_comparisons.py::test_ties_of_plackett_luce",
    ),
    Mutant(
        "reward_model.py",
        "is_better = (group[:, None] == group) & (labels[:, None] > labels)",
        "is_better = labels[:, None] > labels",
        "pairs of answers to different prompts",
        "test_comparisons.py::test_no_pair_spans_two_prompts",
    ),
    Mutant(
        "reward_model.py",
        "1 / (num_pairs * num_compared) if num_pairs",
        "1 / num_compared if num_pairs",
        "a prompt with nine answers counts 36 times one with two",
        "test_steps.py::test_reward_model_of_more_than_pairs[bradley-terry]",
    ),
    Mutant(
        "reward_model.py",
        '"weights": mask / num_labels,',
        '"weights": mask / len(sequences),',
        "outcome over all tokens: the weights are those of sequences",
        "test_steps.py::test_reward_model_of_more_than_pairs[outcome-all]",
    ),
    Mutant(
        "reward_model.py",
        "-(labels * F.logsigmoid(scores) + (1 - labels) * F.logsigmoid(-scores))",
        "-((1 - labels) * F.logsigmoid(scores) + labels * F.logsigmoid(-scores))",
        "right and wrong are swapped",
        "test_steps.py::test_reward_model_of_more_than_pairs[outcome]",
    ),
    Mutant(
        "reward_model.py",
        'mask[len(example["prompt_ids"]) + t] = 1',
        'mask[len(example["prompt_ids"]) + t - 1] = 1',
        "a step's score is read one token early",
        "test_steps.py::test_reward_model_of_more_than_pairs[process]",
    ),
    Mutant(
        "reward_model.py",
        '(batch["prompt_weights"] * losses).sum()',
        "losses.mean()",
        "a mean over completions, not over prompts",
        "test_steps.py::test_reward_model_of_more_than_pairs[plackett-luce]",
    ),
    Mutant(
        "reward_model.py",
        "if not is_finished and ids[-1] == end_id:",
        "if False:",
        "a completion that was cut gets an EOS",
        "test_comparisons.py::test_forms_of_comparisons",
    ),
    Mutant(
        "reward_model.py",
        '"labels": [[float(label) for label in labels]],',
        '"labels": [[float(label) for label in labels][::-1]],',
        "labels of steps from the last to the first",
        "test_comparisons.py::test_steps_end_at_the_separator_and_at_eos",
    ),
    Mutant(
        "common.py",
        'return (F.logsigmoid(scores) * batch["mask"]).amin(1).cpu()',
        'return (F.logsigmoid(scores) * batch["mask"]).sum(1).cpu()',
        "a process reward is the product of its steps",
        "test_comparisons.py::test_a_process_reward_is_its_worst_step[same]",
    ),
    Mutant(
        "common.py",
        'return (F.logsigmoid(scores) * batch["mask"]).amin(1).cpu()',
        'return (scores * batch["mask"]).amin(1).cpu()',
        "a process reward is a log-odds, cut at 0",
        "test_comparisons.py::test_a_process_reward_is_its_worst_step[same]",
    ),
    Mutant(
        "common.py",
        "start = len(os.path.commonprefix([self.ids_of(example, []), ids]))",
        "start = 0",
        "line breaks of the prompt end steps of the answer",
        "test_comparisons.py::test_a_process_reward_is_its_worst_step[same]",
    ),
    Mutant(
        "common.py",
        "        if separator in text.lstrip():",
        "        if separator in text:",
        "empty lines are steps",
        "test_comparisons.py::test_a_process_reward_is_its_worst_step[same]",
    ),
    Mutant(
        "common.py",
        "            ends.append(t)\n            text = text.rpartition",
        "            ends.append(t - 1)\n            text = text.rpartition",
        "a step ends before its separator",
        "test_comparisons.py::test_steps_end_at_the_separator_and_at_eos",
    ),
    Mutant(
        "ppo.py",
        "return member_scores.amin(0)",
        "return member_scores.amax(0)",
        "an ensemble takes its highest score for the lowest",
        "test_comparisons.py::test_combine_scores",
    ),
    Mutant(
        "ppo.py",
        "mean - args.reward_std_coef * member_scores.std(0, correction=0)",
        "mean + args.reward_std_coef * member_scores.std(0, correction=0)",
        "an ensemble seeks disagreement",
        "test_comparisons.py::test_combine_scores",
    ),
    Mutant(
        "grpo.py",
        '"member_scores": member_scores[:, i],',
        '"member_scores": member_scores[:, 0],',
        "the members' scores are those of another completion",
        "test_comparisons.py::test_an_ensemble_through_main[grpo]",
    ),
]


class FirstFailure:
    """Remembers which test failed first, and whether anything could not even be collected."""

    def __init__(self):
        self.failed, self.broken = None, False

    def pytest_runtest_logreport(self, report):
        if report.failed and self.failed is None:
            message = getattr(getattr(report.longrepr, "reprcrash", None), "message", "")
            error = message.split(":")[0].split()[0] if message else "error"
            seen = (
                "" if error in ("assert", "AssertionError", "Failed") else f" ({error})"
            )  # died of what
            self.failed = report.nodeid.split("tests/")[-1] + seen

    def pytest_collectreport(self, report):
        self.broken = self.broken or report.failed


def run_tests(copy, selection):
    """pytest on the copy, with nothing left in memory of an earlier one -> FirstFailure."""
    for name, module in list(sys.modules.items()):
        if str(copy) in (getattr(module, "__file__", None) or ""):
            del sys.modules[name]
    seen, words = FirstFailure(), [str(copy / "tests" / word) for word in selection.split()]
    options = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(copy),
        "-c",
        str(copy / "pytest.ini"),
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = pytest.main([*options, *words], plugins=[seen])
    seen.broken = seen.broken or code not in (0, 1)  # usage errors, no test of that name
    return seen


def main(words):
    have_passed = "--passed" in words
    words = [word for word in words if word != "--passed"]
    root, failures, began = Path(__file__).parents[1], 0, time.time()
    mutants = [m for m in MUTANTS if all(word in " ".join(m) for word in words)]
    sys.dont_write_bytecode = True  # two versions of a file within a second would share a .pyc
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(
            root, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", ".*cache")
        )
        sys.path[:] = [str(copy), str(copy / "tests")] + [
            p for p in sys.path if p != str(root / "tests")
        ]
        if not have_passed:
            selection = " ".join(dict.fromkeys(test for m in mutants for test in m.tests.split()))
            unchanged = run_tests(copy, selection)
            if unchanged.failed or unchanged.broken:
                sys.exit(
                    f"without any mutant {unchanged.failed or 'collection'} fails: mend that first"
                )
        for mutant in mutants:
            path = copy / mutant.file
            text = path.read_text()
            if text.count(mutant.old) != 1:
                verdict = f"FAILURE: its text occurs {text.count(mutant.old)} times"
            else:
                path.write_text(text.replace(mutant.old, mutant.new))
                seen = run_tests(copy, mutant.tests)
                path.write_text(text)
                verdict = "FAILURE: survives" if seen.failed is None else seen.failed
                verdict = "FAILURE: cannot be run" if seen.broken else verdict
            failures += verdict.startswith("FAILURE")
            print(f"{mutant.file:22}{mutant.why}\n{'':22}{verdict}", flush=True)
    print(
        f"{len(mutants) - failures} of {len(mutants)} mutants killed in {time.time() - began:.0f} s"
    )
    sys.exit(failures > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
