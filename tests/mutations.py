"""One-line errors of the kind that real projects shipped, each put into a copy of the scripts; the tests that
should see it are run on the copy, and one of them must fail:

    python tests/mutations.py            all of them, a few minutes; some words of a file or sentence: those

Prints which test killed which mutant, and of what if not by an assertion. A mutant that survives, whose text
does not occur exactly once, or that breaks the import and so dies of nothing, is a failure: exit status 1.
The tests must pass on the copy before anything is changed. One process serves all mutants, since
loading torch and transformers takes long; what was imported from the copy is forgotten in between."""

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
        "module.set_gradient_divide_factor(float(world()))",
        "FSDP's mean over processes, where weights carry the whole count",
        "test_processes.py::test_architectures",
    ),
    Mutant(
        "common.py",
        "        distributed.all_reduce(total)\n",
        "",
        "each process goes its own way",
        "test_processes.py::test_architectures",
    ),
    Mutant(
        "common.py",
        "shares = [cut(order[first :: world()])",
        "order = order[: len(order) // world() * world()]; shares = [cut(order[first :: world()])",
        "rows that the processes do not divide are lost",
        "test_processes.py::test_shares_of_micro_batches",
    ),
    Mutant(
        "common.py",
        "return mine + [[]] * (max(map(len, shares)) - len(mine))",
        "return mine",
        "a process without rows leaves the others waiting",
        "test_processes.py::test_shares_of_micro_batches",
    ),
    Mutant(
        "common.py",
        "with gathered(model) as alone:",
        "noise = noise.flip(0) if rank() else noise\n    with gathered(model) as alone:",
        "noise belongs to a row of a process",
        "test_processes.py::test_architectures",
    ),
    Mutant(
        "grpo.py",
        "                loss_sum = over_ranks(loss_sum)\n",
        "",
        "the first process logs the loss of its own rows",
        "test_processes.py::test_several_processes_compute_what_one_does[2-full-grpo]",
    ),
    Mutant(
        "common.py",
        "position = (last + 1 + column[:more])",
        "position = (last + column[:more])",
        "completions that share a prompt start at its last position",
        "test_shared_prompts.py::test_values_and_gradients_are_those_of_rows_alone",
    ),
    Mutant(
        "common.py",
        "causal = (column[:more] <= column[:more, None])",
        "causal = (column[:more] <= column[:more, None] + 1)",
        "completions that share a prompt look one token ahead",
        "test_shared_prompts.py::test_values_and_gradients_are_those_of_rows_alone",
    ),
    Mutant(
        "common.py",
        "(torch.cat([x.index_select(0, self.which), new], 2) for x, new in",
        "(torch.cat([x.index_select(0, self.which.sort().values), new], 2) for x, new in",
        "completions read the keys of another prompt",
        "test_shared_prompts.py::test_values_and_gradients_are_those_of_rows_alone",
    ),
    Mutant(
        "common.py",
        "(torch.cat([x.index_select(0, self.which), new], 2) for x, new in",
        "(torch.cat([x.detach().index_select(0, self.which), new], 2) for x, new in",
        "no gradient comes back through a shared prompt",
        "test_shared_prompts.py::test_values_and_gradients_are_those_of_rows_alone",
    ),
    Mutant(
        "common.py",
        "x[:, :, self.keys.shape[2] : end] = new",
        "x[:, :, : new.shape[2]] = new",
        "every step of the sampler writes its keys over those of the first token",
        "test_sampler.py::test_fast_and_plain_give_the_same_tokens",
    ),
    Mutant(
        "common.py",
        "x[: len(indices), :, :end] = x[indices, :, :end]",
        "x[: len(indices), :, :end] = x[: len(indices), :, :end]",
        "rows that are left go on with the keys of those that have ended",
        "test_sampler.py::test_fast_and_plain_give_the_same_tokens",
    ),
    Mutant(
        "common.py",
        "order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))",
        "prompts = sorted(prompts, key=lambda p: -len(p)); order = range(len(prompts))",
        "completions come back in the order of their prompts' lengths",
        "test_sampler.py::test_generations_belong_to_their_prompt",
    ),
    Mutant(
        "common.py",
        ".exp_().mul_(-d).scatter_add_(1, y, d)",
        ".exp_().mul_(d).scatter_add_(1, y, d)",
        "the gradient of log-probs in chunks has the softmax with a wrong sign",
        "test_math.py::test_gradient_of_token_logprobs_is_the_dense_one",
    ),
    Mutant(
        "common.py",
        "z.div_(temperature).sub_(logsumexp[rows, None])",
        "z.sub_(logsumexp[rows, None])",
        "the backward pass of log-probs in chunks forgets the temperature",
        "test_math.py::test_gradient_of_token_logprobs_is_the_dense_one",
    ),
    Mutant(
        "common.py",
        "if scaled is not logits:",
        "if scaled is None:",
        "the backward pass of log-probs in chunks forgets the cap (Gemma 2)",
        "test_math.py::test_gradient_of_token_logprobs_is_the_dense_one",
    ),
    Mutant(
        "common.py",
        "d_weight.addmm_(d_z.T, h)",
        "d_weight.copy_(d_z.T @ h)",
        "the head's gradient is that of the last chunk",
        "test_math.py::test_gradient_of_token_logprobs_is_the_dense_one",
    ),
    Mutant(
        "common.py",
        "is_even = 20 * (tokens - real - lengths[i]) <= tokens",
        "is_even = 2 * (tokens - real - lengths[i]) <= tokens",
        "micro-batches of which half is padding",
        "test_invariance.py::test_micro_batches_hold_rows_of_about_one_length",
    ),
    Mutant(
        "grpo.py",
        "old_logprobs[part], entropy[part] = mb_logprobs.detach(), mb_entropy",
        "old_logprobs[part], entropy[part] = mb_logprobs, mb_entropy",
        "the ratio's own denominator has a gradient, so that nothing is learnt from a single update",
        "test_group.py",
    ),
    Mutant(
        "sft.py",
        "padded_tokens += mb.input_ids.numel()",
        "padded_tokens += sum(mb.lengths)",
        "padding that is logged is always 0",
        "test_padding.py",
    ),
    Mutant(
        "common.py",
        "masks = [[0] * len(p) + [1] * len(c) for p, c in zip(prompts, completions)]",
        "masks = [[0] * len(p) + [1] * (len(c) - 1) + [0] for p, c in zip(prompts, completions)]",
        "the last token, EOS, is masked out, so that stopping is never trained (nanochat, trl#1623)",
        "test_math.py::test_token_logprobs",
    ),
    Mutant(
        "common.py",
        "masks = [[0] * len(p) + [1] * len(c) for p, c in zip(prompts, completions)]",
        "masks = [[1] * len(p) + [1] * len(c) for p, c in zip(prompts, completions)]",
        "prompt tokens count as the policy's own",
        "test_math.py::test_token_logprobs",
    ),
    Mutant(
        "common.py",
        "attention_mask = [[1] * n + [0] * (width - n) for n in lengths]",
        "attention_mask = [[int(i != pad_id) for i in ids] for ids in input_ids]",
        "the mask comes from ids, and hides what has PAD's id (tiny-grpo)",
        "test_math.py::test_token_logprobs",
    ),
    Mutant(
        "common.py",
        "position = (seen.cumsum(1) - 1).clamp(min=0)",
        "position = torch.arange(width, device=device).expand_as(seen)",
        "left padding without positions of its own (RLHF book, trl#469)",
        "test_sampler.py::test_logprobs_are_those_of_the_training_forward",
    ),
    Mutant(
        "common.py",
        "logp = (logits / (temperature or 1.0)).log_softmax(-1)",
        "logp = logits.log_softmax(-1)",
        "the sampler forgets the temperature",
        "test_sampler.py::test_logprobs_are_those_of_the_training_forward",
    ),
    Mutant(
        "common.py",
        "noise[row, t, None] * cdf",
        "noise[: len(row), t, None] * cdf",
        "noise belongs to the place in the batch, so that dropping finished rows changes tokens",
        "test_sampler.py::test_logprobs_are_those_of_the_training_forward",
    ),
    Mutant(
        "common.py",
        "row, token, position, unfinished = (x[keep] for x in (row, token, position, unfinished))",
        "row, token, position, unfinished = (x[keep] for x in (row.flip(0), token, position, unfinished))",
        "tokens of the rows that are left go to the wrong rows",
        "test_sampler.py::test_logprobs_are_those_of_the_training_forward",
    ),
    Mutant(
        "common.py",
        "ids = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}",
        "return [tokenizer.eos_token_id]",
        "only the tokenizer's EOS ends a completion (trl#7039)",
        "test_data.py::test_text_rows_end_once_where_the_tokenizer_has_a_chat_template",
    ),
    Mutant(
        "common.py",
        "setattr(part, name, 0.0)",
        "setattr(part, name, value)",
        "dropout stays on",
        "test_invariance.py::test_dropout_that_is_no_module_is_off",
    ),
    Mutant(
        "common.py",
        "logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping",
        "logits = logits.clamp(-config.final_logit_softcapping, config.final_logit_softcapping)",
        "the cap of Gemma 2's logits is lost",
        "test_math.py::test_token_logprobs",
    ),
    Mutant(
        "common.py",
        'order = torch.randperm(n, generator=generator(seed, "shuffle", epoch)).tolist()',
        'order = torch.randperm(n, generator=generator(seed, "shuffle")).tolist()',
        "every epoch has the same order",
        "test_data.py::test_shuffled_is_another_order_in_each_epoch_and_for_each_seed",
    ),
    Mutant(
        "common.py",
        "attention_mask.sum(1) - 1].float()",
        "attention_mask.sum(1) - 2].float()",
        "a score is read at the token before the last",
        "test_rewards.py::test_score_is_read_at_the_last_token_by_length",
    ),
    Mutant(
        "common.py",
        "result[rows, : value.shape[1]] = value",
        "result[: len(rows), : value.shape[1]] = value",
        "micro-batches are put back in the wrong rows",
        "test_invariance.py::test_results_do_not_depend_on_the_micro_batch_budget",
    ),
    Mutant(
        "common.py",
        "done = max(0, step - args.warmup_steps) / max(1, steps - args.warmup_steps)",
        "done = max(0, step - args.warmup_steps) / steps",
        "the learning rate does not reach 0",
        "test_scripts.py::test_learning_rate_schedules",
    ),
    Mutant(
        "sft.py",
        "mask = mb.completion_mask[:, 1:]",
        "mask = mb.attention_mask[:, 1:]",
        "the loss covers the prompt",
        "test_scripts.py::test_sft_trains_each_completion_once_and_no_prompt",
    ),
    Mutant(
        "sft.py",
        "loss = sft_loss(logprobs, mask / tokens)",
        "loss = sft_loss(logprobs, mask / mask.sum())",
        "each micro-batch has a denominator of its own: a mean of means (trl#2175)",
        "test_scripts.py::test_training_does_not_depend_on_the_micro_batches",
    ),
    Mutant(
        "sft.py",
        "steps = -(-args.epochs * len(examples) // args.batch_size)",
        "steps = args.epochs * len(examples) // args.batch_size",
        "the last batch, a smaller one, is dropped",
        "test_scripts.py::test_sft_trains_each_completion_once_and_no_prompt",
    ),
    Mutant(
        "reward_model.py",
        "difference = chosen_scores - rejected_scores\n    return",
        "difference = rejected_scores - chosen_scores\n    return",
        "chosen and rejected are swapped",
        "test_math.py::test_bradley_terry_loss",
    ),
    Mutant(
        "reward_model.py",
        "attention_mask.sum(1) - 1]",
        "-1]",
        "the score is read at the last column, which is padding (trl#2778)",
        "test_math.py::test_sequence_scores",
    ),
    Mutant(
        "reward_model.py",
        "loss = losses.sum() / len(picked)",
        "loss = losses.mean()",
        "a mean of means over micro-batches of pairs",
        "test_scripts.py::test_training_does_not_depend_on_the_micro_batches",
    ),
    Mutant(
        "reward_model.py",
        "else difference - margin",
        "else difference + margin",
        "the margin is given to the rejected one",
        "test_math.py::test_bradley_terry_loss",
    ),
    Mutant(
        "rejection_sampling.py",
        "-torch.inf).argmax(1)",
        "torch.inf).argmin(1)",
        "the worst completion of each prompt is kept",
        "test_rejection_sampling.py::test_worked_example_of_the_book",
    ),
    Mutant(
        "rejection_sampling.py",
        "sort(descending=True, stable=True)",
        "sort(stable=True)",
        "the worst k of all are kept",
        "test_rejection_sampling.py::test_worked_example_of_the_book",
    ),
    Mutant(
        "rejection_sampling.py",
        "flat.masked_fill(flat.isnan(), -torch.inf)",
        "flat.masked_fill(flat.isnan(), 0.0)",
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
        'generator(args.seed, "sample", (iteration, first))',
        'generator(args.seed, "sample", iteration)',
        "every chunk of prompts draws with the same noise",
        "test_rejection_sampling.py::test_chunks_of_prompts_draw_from_streams_of_their_own",
    ),
    Mutant(
        "ppo.py",
        "hidden = hidden[:, :-1][mask]",
        "hidden = hidden[:, 1:][mask]",
        "no shift: a token's log-prob is read where it is already known",
        "test_math.py::test_token_logprobs",
    ),
    Mutant(
        "ppo.py",
        "return -kl_coef * (logprobs - ref_logprobs) * mask",
        "return kl_coef * (logprobs - ref_logprobs) * mask",
        "the KL is rewarded (TinyZero)",
        "test_math.py::test_token_rewards",
    ),
    Mutant(
        "ppo.py",
        "is_last = (from_here == 1) & mask.bool()",
        "is_last = ((from_here == 1) & mask.bool()).roll(1, 1)",
        "the score falls on the first PAD (trl#3750)",
        "test_math.py::test_token_rewards",
    ),
    Mutant(
        "ppo.py",
        "delta = rewards[:, t] + gamma * next_value - values[:, t]",
        "delta = rewards[:, t] + gamma * values[:, t] - next_value",
        "GAE is off by one: V_t and V_t+1 are swapped",
        "test_math.py::test_gae",
    ),
    Mutant(
        "ppo.py",
        "next_value = values[:, t] * mask[:, t]",
        "next_value = values[:, t]",
        "GAE bootstraps from a value past the end",
        "test_math.py::test_gae",
    ),
    Mutant(
        "ppo.py",
        "advantage = (delta + gamma * lam * advantage) * mask[:, t]",
        "advantage = delta + gamma * lam * advantage",
        "GAE runs on through padding",
        "test_math.py::test_gae",
    ),
    Mutant(
        "ppo.py",
        "ratio = (logprobs - old_logprobs).exp()\n",
        "ratio = (old_logprobs - logprobs).exp()\n",
        "the ratio is inverted",
        "test_math.py::test_policy_loss",
    ),
    Mutant(
        "ppo.py",
        "return (weights * torch.max(pg_loss1, pg_loss2)).sum()",
        "return (weights * pg_loss1).sum()",
        "the clip is dropped",
        "test_math.py::test_policy_loss",
    ),
    Mutant(
        "ppo.py",
        "return (weights * torch.max(pg_loss1, pg_loss2)).sum()",
        "return (weights * torch.min(pg_loss1, pg_loss2)).sum()",
        "the clip is on the wrong side, the optimistic one",
        "test_math.py::test_policy_loss",
    ),
    Mutant(
        "ppo.py",
        "moved = old_values + (values - old_values)",
        "moved = values + (old_values - values)",
        "the value clip is around the new value",
        "test_math.py::test_value_loss",
    ),
    Mutant(
        "ppo.py",
        "var = masked_mean((x - mean) ** 2, mask)",
        "var = ((x - mean) ** 2).mean()",
        "whitening counts padding",
        "test_math.py::test_masked_whiten",
    ),
    Mutant(
        "ppo.py",
        "advantages = masked_whiten(advantages, train_mask)\n",
        "advantages = masked_whiten(advantages, train_mask)\n        returns = advantages + old_values\n",
        "returns are taken after whitening",
        "test_scripts.py::test_ppo_pays_for_missing_eos_and_learns_values",
    ),
    Mutant(
        "ppo.py",
        "token_logprobs(model, *x, args.temperature)",
        "token_logprobs(model, *x)",
        "the temperature is missing from the old and the reference's log-probs",
        "test_scripts.py::test_ppo_starts_at_ratio_one_and_kl_zero",
    ),
    Mutant(
        "common.py",
        " - (not finished)]",
        "]",
        "a completion that was cut is scored with an end of turn",
        "test_rewards.py::test_another_tokenizer_is_given_messages_through_its_own_template",
    ),
    Mutant(
        "ppo.py",
        "train_mask = mask * ~scores.isnan()[:, None]",
        "train_mask = mask",
        "None counts as a score of 0 (trl#5902)",
        "test_scripts.py::test_ppo_trains_on_nothing_that_was_not_judged",
    ),
    Mutant(
        "rejection_sampling.py",
        "token_logprobs(model, *x, args.temperature)",
        "token_logprobs(model, *x)",
        "the temperature is missing from the KL of an evaluation",
        "test_rejection_sampling.py::test_evaluation_measures_the_kl_at_the_temperature_of_sampling",
    ),
    Mutant(
        "rejection_sampling.py",
        '"gold": golds[mine]',
        '"gold": golds[:N]',
        "rollouts hold the first prompt's verdicts for all",
        "test_rejection_sampling.py::test_rollouts_hold_each_completions_own_numbers",
    ),
    Mutant(
        "common.py",
        '("_greedy", 1, 0.0)',
        '("_greedy", 1, 1.0)',
        "what is called greedy is sampled",
        "test_group.py::test_pass_at_g",
    ),
    Mutant(
        "common.py",
        "zip(rows, values[::number].tolist())",
        "zip(rows, values.tolist())",
        "samples.jsonl pairs completions with the numbers of others",
        "test_group.py::test_pass_at_g",
    ),
    Mutant(
        "common.py",
        'columns["kl"] -= ref_logps',
        'columns["kl"] += ref_logps',
        "the sign of the reference in the KL of an evaluation",
        "test_group.py::test_pass_at_g",
    ),
    Mutant(
        "ppo.py",
        "mb_logprobs, _ = token_logprobs(policy, *mb_inputs, args.temperature)",
        "mb_logprobs, _ = token_logprobs(policy, *mb_inputs)",
        "the temperature is missing from the log-probs that are trained (trl#4159)",
        "test_scripts.py::test_ppo_starts_at_ratio_one_and_kl_zero",
    ),
    Mutant(
        "ppo.py",
        "reference = load_policy(args.model, device) if args.kl_coef else None",
        "reference = policy if args.kl_coef else None",
        "the reference is not frozen: it is the policy",
        "test_scripts.py::test_ppo_starts_at_ratio_one_and_kl_zero",
    ),
    Mutant(
        "ppo.py",
        "mb_advantages, mb_weights = advantages[part], weights[part]",
        "mb_advantages, mb_weights = advantages[part], train_mask[part] / train_mask[part].sum()",
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
        'generator(args.seed, "sample", step))',
        'generator(args.seed, "sample"))',
        "every step draws with the same noise",
        "test_scripts.py::test_every_step_draws_afresh",
    ),
    Mutant(
        "ppo.py",
        "scores - args.missing_eos_penalty * unfinished",
        "scores - args.missing_eos_penalty * ~unfinished",
        "ending in EOS costs what not ending should (trl#6802)",
        "test_scripts.py::test_ppo_pays_for_missing_eos_and_learns_values",
    ),
    Mutant(
        "ppo.py",
        "return advantages, (advantages + values) * mask",
        "return advantages, (advantages - values) * mask",
        "returns are advantages less values",
        "test_math.py::test_gae",
    ),
    Mutant(
        "grpo.py",
        "picked = [e for e in picked for _ in range(args.num_generations)]",
        "picked = [e for _ in range(args.num_generations) for e in picked]",
        "rewards are tiled, not interleaved: completions are scored for other prompts (nanoGRPO)",
        "test_group.py::test_advantages_belong_to_their_own_prompts",
    ),
    Mutant(
        "grpo.py",
        "/ others.clamp(min=1)).sqrt()",
        "/ (others + 1)).sqrt()",
        "the group's standard deviation is the biased one",
        "test_identities.py::test_dividing_by_the_deviation_of_the_group",
    ),
    Mutant(
        "grpo.py",
        '"k3": torch.expm1(-x) + x',
        '"k3": torch.expm1(x) - x',
        "k3 of the reciprocal ratio (RLHF book)",
        "test_identities.py::test_where_a_kl_loss_rests",
    ),
    Mutant(
        "grpo.py",
        "loss = loss + args.kl_coef * (mb_weights * kl).sum()",
        "loss = loss - args.kl_coef * (mb_weights * kl).sum()",
        "the KL loss is subtracted (TinyZero)",
        "test_group.py::test_the_kl_pulls_back_to_the_reference",
    ),
    Mutant(
        "grpo.py",
        'rewards = rewards - args.kl_coef * kl_penalty(old_logprobs, ref_logprobs, "k1").sum(1)',
        'rewards = rewards + args.kl_coef * kl_penalty(old_logprobs, ref_logprobs, "k1").sum(1)',
        "the KL in the reward has the wrong sign (RLHF book)",
        "test_group.py::test_the_kl_pulls_back_to_the_reference",
    ),
    Mutant(
        "grpo.py",
        "mask.sum(1, keepdim=True).clamp(min=1), mask.sum().clamp(min=1)",
        "mask.sum(1, keepdim=True).clamp(min=1), torch.tensor(mask.numel())",
        "the token mean counts padding",
        "test_identities.py::test_the_mean_over_the_tokens_of_a_batch",
    ),
    Mutant(
        "grpo.py",
        "weights[minibatch] = loss_weights(train_mask[minibatch], *aggregation)",
        "weights[minibatch] = loss_weights(train_mask, *aggregation)[minibatch]",
        "the denominator is that of the whole rollout, not of the minibatch",
        "test_group.py::test_each_minibatch_has_its_own_normaliser",
    ),
    Mutant(
        "grpo.py",
        "[[c[-1] in stop_ids] for c in completions], device=device)",
        "[[c[-1] not in stop_ids] for c in completions], device=device)",
        "--mask-truncated masks the completions that ended",
        "test_group.py::test_truncated_completions_are_masked_and_still_counted",
    ),
    Mutant(
        "grpo.py",
        "high = epsilon if epsilon_high is None else epsilon_high",
        "high = epsilon",
        "--epsilon-high does nothing",
        "test_group.py::test_grpo_loss",
    ),
    Mutant(
        "grpo.py",
        "train_mask = mask * ~scores.isnan()[:, None]",
        "train_mask = mask",
        "what the checker cannot judge is trained on",
        "test_group.py::test_grpo_step_is_the_formula",
    ),
    Mutant(
        "rloo.py",
        "advantages = groups - (groups.nansum(1, keepdim=True) - groups) / others.clamp(min=1)",
        "advantages = groups - groups.nanmean(1, keepdim=True)",
        "the baseline includes the completion itself",
        "test_identities.py::test_leave_one_out_and_plain_reinforce_are_unbiased",
    ),
    Mutant(
        "rloo.py",
        "return (weights * -advantages * ratio",
        "return (weights * advantages * ratio",
        "the gradient descends the reward",
        "test_identities.py::test_leave_one_out_and_plain_reinforce_are_unbiased",
    ),
    Mutant(
        "rloo.py",
        "rewards = penalised - args.kl_coef * (old_logprobs - ref_logprobs).sum(1)",
        "rewards = penalised - args.kl_coef * (old_logprobs - ref_logprobs).mean(1)",
        "the KL is averaged over tokens and padding",
        "test_group.py::test_rloo_pays_the_kl_before_the_baseline",
    ),
    Mutant(
        "rloo.py",
        "rewards = penalised - args.kl_coef * (old_logprobs - ref_logprobs).sum(1)",
        "rewards = penalised - args.kl_coef * (ref_logprobs - old_logprobs).sum(1)",
        "the KL has the wrong direction",
        "test_group.py::test_rloo_pays_the_kl_before_the_baseline",
    ),
    Mutant(
        "rloo.py",
        "~clipped * logprobs).sum()",
        "logprobs).sum()",
        "the clip is dropped",
        "test_group.py::test_reinforce_loss_of_a_ratio_that_overflows_is_finite",
    ),
    Mutant(
        "dpo.py",
        "h = chosen_rewards - rejected_rewards - margin",
        "h = rejected_rewards - chosen_rewards - margin",
        "chosen and rejected are swapped",
        "test_dpo.py::test_preference_loss",
    ),
    Mutant(
        "dpo.py",
        "mb_logps = torch.stack(logprobs.sum(1).chunk(2), 1)",
        "mb_logps = torch.stack((logprobs.sum(1) / mb_inputs[2].sum(1)).chunk(2), 1)",
        "log-probs are averaged, not summed",
        "test_dpo.py::test_first_step_and_learning",
    ),
    Mutant(
        "dpo.py",
        "mb_logps = torch.stack(logprobs.sum(1).chunk(2), 1)",
        "mb_logps = logprobs.sum(1).view(-1, 2)",
        "neighbours in the batch are taken for pairs",
        "test_dpo.py::test_first_step_and_learning",
    ),
    Mutant(
        "dpo.py",
        "rejected_rewards = beta * (rejected_logps - ref_rejected_logps)",
        "rejected_rewards = beta * rejected_logps",
        "the reference of the rejected ones is left out",
        "test_dpo.py::test_preference_loss",
    ),
    Mutant(
        "dpo.py",
        "losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)",
        "losses = -(1 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)",
        "label smoothing of robust DPO without its divisor",
        "test_dpo.py::test_preference_loss",
    ),
    Mutant(
        "dpo.py",
        "(losses.sum() / len(picked)).backward()",
        "losses.mean().backward()",
        "a mean of means over micro-batches of pairs",
        "test_dpo.py::test_micro_batches_and_cached_reference_change_nothing",
    ),
    Mutant(
        "common.py",
        "        optimizer.load_state_dict(state)\n",
        "",
        "--resume forgets the optimiser's state",
        "test_resume.py::test_resume_is_exact",
    ),
    Mutant(
        "common.py",
        'if json.loads(line)["step"] <= step))',
        "))",
        "lines of metrics.jsonl are doubled after --resume",
        "test_resume.py::test_resume_is_exact",
    ),
    Mutant(
        "common.py",
        "if number is not None or is_last or due(",
        "if is_last or due(",
        "Ctrl-C ends the run without saving",
        "test_resume.py::test_signals_finish_the_step_and_save",
    ),
    Mutant(
        "common.py",
        "if not math.isfinite(value):\n                with",
        "if value > 1e30:\n                with",
        "an update with NaN is applied",
        "test_resume.py::test_a_loss_that_is_not_finite_stops_the_run",
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
