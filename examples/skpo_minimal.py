"""SKPO from q to loss in one file of plain PyTorch, on a task that one CPU core learns in 45 seconds.

    python examples/skpo_minimal.py [--steps 30] [--seed 1]

Read it from top to bottom: a task, a small GPT, the method in the order of docs/method.md, whose sections and equations
are named at each function, and the training loop.  recipe/skpo/method/ has the same mathematics for batches with failed
requests, padding and ablations; tests/unit/examples/test_skpo_minimal.py compares the two.  Seed 1 goes from 0.455 to
0.818 held-out accuracy; a processor that rounds otherwise differs.  Shapes: R rows, T tokens, P prompts, G siblings.
"""

import argparse
import math
import random

import torch
from torch import Tensor, nn

GROUP_SIZE = 8  # G: candidates upstream, siblings downstream
PROMPTS_PER_STEP, PROMPTS_PER_UPDATE = 32, 16
CLIP_LOW, CLIP_HIGH, WEIGHT_UP, WEIGHT_DOWN = 0.2, 0.28, 0.5, 0.5

# ---------------------------------------------------------------- the task
# A problem q is a sum of five small digits, "3+1+4+2+2=".  The policy learned from two teachers: one writes the running
# totals, "4,8,10,12.", the other guesses, "15.".  The reward looks at the last number alone; SKPO has to find out that
# working is better than guessing.

Problem = tuple[int, ...]
Sampled = tuple[list[int], list[float]]  # tokens, END included, with log pi of each
VOCABULARY = "_0123456789+=,."
PAD, END = VOCABULARY.index("_"), VOCABULARY.index(".")
DIGITS, TERMS, BUDGET = 4, 5, 12  # digits from 1 to 4, five of them, and at most 12 tokens of a response


def encode(text: str) -> list[int]:
    """Return a token per character."""
    return [VOCABULARY.index(character) for character in text]


def question(problem: Problem) -> list[int]:
    """Return the tokens of q."""
    return encode("+".join(map(str, problem)) + "=")


def worked_solution(problem: Problem) -> list[int]:
    """Write the running totals."""
    return encode(",".join(str(sum(problem[:count])) for count in range(2, TERMS + 1)) + ".")


def guess() -> list[int]:
    """Write any sum that five digits can have."""
    return encode(f"{random.randint(TERMS, TERMS * DIGITS)}.")


def reward(response: list[int], problem: Problem) -> float:
    """R_II of section 5: +1 if the response ends with the right sum, else -1."""
    *_, last = "".join(VOCABULARY[token] for token in response).split(",")
    return 1.0 if last == f"{sum(problem)}." else -1.0


# ---------------------------------------------------------------- the policy
def rotated(x: Tensor) -> Tensor:
    """Rotary positions of queries or keys (R, heads, T, width).

    Attention then depends on distances alone: padding on the left moves nothing, and q reads the same behind a segment.
    """
    first, second = x.chunk(2, -1)
    angles = torch.outer(torch.arange(x.shape[-2]), 100.0 ** -torch.linspace(0, 1, first.shape[-1]))
    return torch.cat([first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()], -1)


class Block(nn.Module):
    """Attention and a feed-forward part, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Map (R, T, width) to the same; ``visible`` is bool (R, 1, T, T)."""
        query, key, value = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        read = nn.functional.scaled_dot_product_attention(rotated(query), rotated(key), value, attn_mask=visible)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norm_2(x))


class Policy(nn.Module):
    """pi: a GPT over characters with about 0.1 million parameters."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(VOCABULARY), width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(VOCABULARY))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the log-probs of the next token, (R, T, vocabulary), of tokens (R, T)."""
        itself = torch.eye(ids.shape[1], dtype=torch.bool)  # what padding attends to: a softmax over nothing is NaN
        visible = torch.ones_like(itself).tril() & ((ids != PAD)[:, None, None, :] | itself)
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, visible)
        return self.head(self.norm(x)).index_fill(-1, torch.tensor(PAD), -1e9).log_softmax(-1)


def padded_left(rows: list[list[int]]) -> Tensor:
    """Return prompts as a tensor (R, T)."""
    width = max(map(len, rows))
    return torch.tensor([[PAD] * (width - len(row)) + row for row in rows])


@torch.no_grad()
def sample(policy: Policy, prompts: list[list[int]], budget: int, copies: int = 1) -> list[list[Sampled]]:
    """Continue each prompt ``copies`` times at temperature 1; return a group per prompt."""
    ids = padded_left([prompt for prompt in prompts for _ in range(copies)])
    start, log_probs, ended = ids.shape[1], [], torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(budget):
        distribution = policy(ids)[:, -1]
        token = torch.multinomial(distribution.exp(), 1)
        log_probs.append(distribution.gather(-1, token))
        ids = torch.cat([ids, token.masked_fill(ended.unsqueeze(-1), PAD)], 1)
        ended |= token.squeeze(-1) == END
    written, sizes = ids[:, start:], (ids[:, start:] != PAD).sum(-1).tolist()
    rows = zip(written.tolist(), torch.cat(log_probs, 1).tolist(), sizes, strict=True)
    responses = [(tokens[:size], logs[:size]) for tokens, logs, size in rows]
    return [responses[first : first + copies] for first in range(0, len(responses), copies)]


def response_log_probs(policy: Policy, prompts: list[list[int]], responses: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return log pi of every response token, and 1 where there is a token; float (R, BUDGET) each."""
    left = padded_left(prompts)
    right = torch.tensor([response + [PAD] * (BUDGET - len(response)) for response in responses])
    log_probs = policy(torch.cat([left, right], 1))[:, left.shape[1] - 1 : -1].gather(-1, right.unsqueeze(-1))
    return log_probs.squeeze(-1).masked_fill(right == PAD, 0), (right != PAD).float()


# ---------------------------------------------------------------- phase I: from q to one segment
def split_position(mean_length: float) -> int:
    """Section 1: t_q ~ Uniform[L_q / 6, L_q / 2], an integer of at least 1."""
    last = max(1, math.floor(mean_length / 2))
    return random.randint(min(last, max(1, math.ceil(mean_length / 6))), last)


def cut(candidate: list[int], log_probs: list[float], split: int) -> tuple[list[int], float]:
    """Section 2: the segment of a candidate; section 3: its deviation d, the mean of -log pi of the segment's tokens.

    A candidate that ended within t_q tokens gives its first half, because a finished response cannot be continued.
    """
    early = len(candidate) <= split and candidate[-1] == END
    segment = candidate[: max(1, len(candidate) // 2) if early else split]
    return segment, -math.fsum(log_probs[: len(segment)]) / len(segment)


def select(deviations: list[float]) -> int:
    """Section 3: the candidate whose d is closest to the median; of an even number, the earlier of the middle two."""
    ordered, count = sorted(deviations), len(deviations)
    return min(deviations.index(ordered[(count - 1) // 2]), deviations.index(ordered[count // 2]))


def skip_prompt(segment: list[int], q: list[int]) -> list[int]:
    """Section 4: [s, q], the segment and then the problem.  A BOS would stand before both; this vocabulary has none."""
    return segment + q


# ---------------------------------------------------------------- what is remembered of a prompt
class PromptTable:
    """Section 6: running means of reward and length per prompt, which forget as the policy moves.

    The drift D is the policy's KL since the prompt's last visit, divided by its mean per step: it reads in steps.
    """

    RHO_MIN, RHO_MAX, HALF_LIFE = 0.875, 0.96, 8.0

    def __init__(self, prompts: int, initial_length: float) -> None:
        self.values, self.lengths = [0.5] * prompts, [initial_length] * prompts  # V in [0, 1] and L in tokens
        self.counts, self.kl_at_visit = [0.0] * prompts, [0.0] * prompts
        self.steps, self.total_kl = 0, 0.0

    def baseline(self, prompt: int) -> float:
        """Section 7: V as a reward in [-1, 1]; 0 before the first visit."""
        return 2 * self.values[prompt] - 1

    def visit(self, prompt: int, segment_reward: float, length: float) -> None:
        """Fold in R_I and the mean length of the siblings."""
        drift = (self.total_kl - self.kl_at_visit[prompt]) * self.steps / max(self.total_kl, 1e-9)
        rho = min(self.RHO_MAX, max(self.RHO_MIN, 2 ** (-drift / self.HALF_LIFE)))
        self.counts[prompt] = rho * self.counts[prompt] + 1  # N; the step size eta is 1 / N
        self.values[prompt] += ((segment_reward + 1) / 2 - self.values[prompt]) / self.counts[prompt]
        self.lengths[prompt] += (length - self.lengths[prompt]) / self.counts[prompt]
        self.kl_at_visit[prompt] = self.total_kl

    def draw(self, count: int) -> list[int]:
        """Section 13: different prompts, by sqrt(V (1 - V)) + 0.05; half-solved ones teach most."""
        values = torch.tensor(self.values).clamp(0, 1)
        return torch.multinomial((values * (1 - values)).sqrt() + 0.05, count).tolist()


# ---------------------------------------------------------------- advantages
def upstream_advantage(rewards: Tensor, baselines: Tensor) -> Tensor:
    """Section 7: A~ of each segment, against its prompt's past, normalised over the batch; (P,)."""
    advantage = rewards - baselines
    return (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)


def downstream_advantage(rewards: Tensor) -> Tensor:
    """Section 8: A_i of each response, against its siblings, (P, G); 0 where all of them have the same reward."""
    std = rewards.std(-1, correction=0, keepdim=True)
    return torch.where(std > 1e-8, (rewards - rewards.mean(-1, keepdim=True)) / std.clamp(min=1e-8), 0.0)


# ---------------------------------------------------------------- the loss
# A prompt has G + 1 rows: its segment under q first, then its responses under [s, q].
def upstream_objective(ratio: Tensor, advantage: Tensor) -> Tensor:
    """Equation 6, of each token: the clipped surrogate."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)


def downstream_objective(ratio: Tensor, log_prob: Tensor, advantage: Tensor) -> Tensor:
    """Equation 5, of each token: log pi times the clipped ratio, through which no gradient flows."""
    return ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH).detach() * advantage * log_prob


def loss_weights(lengths: Tensor) -> Tensor:
    """Section 9: the weight of each token of a row, (P, G + 1), from the rows' lengths.

    Equation 6 is a mean over a segment's tokens, equation 5 over those of all siblings; both are means over prompts.
    """
    pooled = lengths[:, 1:].sum(-1, keepdim=True).expand(-1, lengths.shape[1] - 1)
    return torch.cat([WEIGHT_UP / lengths[:, :1], WEIGHT_DOWN / pooled], 1) / len(lengths)


def skpo_loss(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """Section 9: both objectives of an update, weighted and negated; (P, G + 1, T), and (P, G + 1) advantages."""
    ratio, advantages = (log_prob - old_log_prob).exp(), advantages.unsqueeze(-1)
    up = upstream_objective(ratio[:, :1], advantages[:, :1])
    down = downstream_objective(ratio[:, 1:], log_prob[:, 1:], advantages[:, 1:])
    return -(loss_weights(mask.sum(-1)).unsqueeze(-1) * torch.cat([up, down], 1) * mask).sum()


# ---------------------------------------------------------------- training
def warm_up(policy: Policy, problems: list[Problem], steps: int = 400, batch: int = 64) -> None:
    """Teach both ways of answering, by supervision.

    Every other prompt is a skip prompt.  A pretrained model has read text in every order; one that starts from nothing
    has to see [s, q] here.  Without it 0.145 of its responses are right if s begins a worked solution, with it 0.885.
    """
    optimizer = torch.optim.AdamW(policy.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        prompts, responses = [], []
        for number, problem in enumerate(random.choices(problems, k=batch)):
            q, response = question(problem), worked_solution(problem) if random.random() < 0.5 else guess()
            segment = response[: random.randint(1, len(response) // 2)]
            prompts.append(skip_prompt(segment, q) if number % 2 else q)
            responses.append(response)
        log_prob, mask = response_log_probs(policy, prompts, responses)
        optimizer.zero_grad()
        (-log_prob.sum() / mask.sum()).backward()
        optimizer.step()
        schedule.step()


def skpo_step(policy: Policy, optimizer: torch.optim.Optimizer, problems: list[Problem], table: PromptTable) -> float:
    """Train one step; return the mean reward."""
    visited = table.draw(PROMPTS_PER_STEP)
    questions = [question(problems[prompt]) for prompt in visited]

    # I: G candidates, cut at t_q.  The median one becomes s, the others are never trained.
    splits = [split_position(table.lengths[prompt]) for prompt in visited]
    segments = []
    for split, candidates in zip(splits, sample(policy, questions, max(splits), GROUP_SIZE), strict=True):
        cuts = [cut(tokens[:split], log_probs[:split], split) for tokens, log_probs in candidates]
        segments.append(cuts[select([deviation for _, deviation in cuts])][0])

    # II: G responses to [s, q].  Their rewards score the segment (section 5: R_I is their mean), and each other.
    skip_prompts = [skip_prompt(segment, q) for segment, q in zip(segments, questions, strict=True)]
    groups = [[tokens for tokens, _ in group] for group in sample(policy, skip_prompts, BUDGET, GROUP_SIZE)]
    scored = zip(visited, groups, strict=True)
    rewards = torch.tensor([[reward(tokens, problems[prompt]) for tokens in group] for prompt, group in scored])
    segment_rewards = rewards.mean(-1)

    # Every baseline is read before this batch changes it.
    baselines = torch.tensor([table.baseline(prompt) for prompt in visited])
    upstream = upstream_advantage(segment_rewards, baselines).unsqueeze(-1)
    advantages = torch.cat([upstream, downstream_advantage(rewards)], 1)
    for prompt, segment_reward, group in zip(visited, segment_rewards.tolist(), groups, strict=True):
        table.visit(prompt, segment_reward, sum(map(len, group)) / GROUP_SIZE)

    # Updates take whole prompts.  The policy before the first of them is pi_old of all.
    row_prompts = [row for q, skip in zip(questions, skip_prompts, strict=True) for row in [q] + [skip] * GROUP_SIZE]
    row_tokens = [row for segment, group in zip(segments, groups, strict=True) for row in [segment, *group]]

    def rows_of(part: slice) -> list[Tensor]:
        """Return log pi and mask of the rows of these prompts, (P, G + 1, T) each."""
        rows = slice(part.start * (GROUP_SIZE + 1), part.stop * (GROUP_SIZE + 1))
        values = response_log_probs(policy, row_prompts[rows], row_tokens[rows])
        return [value.unflatten(0, (-1, GROUP_SIZE + 1)) for value in values]

    parts = [slice(first, first + PROMPTS_PER_UPDATE) for first in range(0, PROMPTS_PER_STEP, PROMPTS_PER_UPDATE)]
    with torch.no_grad():
        old_log_probs = [rows_of(part)[0] for part in parts]
    kl = tokens = 0.0
    for part, old_log_prob in zip(parts, old_log_probs, strict=True):
        log_prob, mask = rows_of(part)
        optimizer.zero_grad()
        skpo_loss(log_prob, old_log_prob, mask, advantages[part]).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        log_ratio = (log_prob - old_log_prob).detach()
        kl, tokens = kl + float(((log_ratio.exp() - 1 - log_ratio) * mask).sum()), tokens + float(mask.sum())
    table.steps, table.total_kl = table.steps + 1, table.total_kl + kl / tokens
    return float(rewards.mean())


def held_out(policy: Policy, problems: list[Problem]) -> str:
    """Answer plain q, without split and skip prompt, as a user of the policy would ask it."""
    answers = [group[0][0] for group in sample(policy, [question(problem) for problem in problems], BUDGET)]
    right = sum(reward(answer, problem) > 0 for answer, problem in zip(answers, problems, strict=True))
    worked = sum(encode(",")[0] in answer for answer in answers)
    return f"held-out accuracy {right / len(problems):.3f}, with totals {worked / len(problems):.0%}"


def main() -> None:
    """Warm up, then train by SKPO; print held-out accuracy before, during and after."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums have one order
    random.seed(options.seed)
    torch.manual_seed(options.seed)

    problems = [tuple(index // DIGITS**place % DIGITS + 1 for place in range(TERMS)) for index in range(DIGITS**TERMS)]
    random.shuffle(problems)
    tests, train = problems[:400], problems[400:]
    warm_up(policy := Policy(), train)
    print(f"warm-up    {held_out(policy, tests)}", flush=True)

    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4)
    table = PromptTable(len(train), initial_length=BUDGET)
    for step in range(1, options.steps + 1):
        mean_reward = skpo_step(policy, optimizer, train, table)
        if step % 5 == 0:
            print(f"step {step:4d}  {held_out(policy, tests)}, reward {mean_reward:+.2f}", flush=True)


if __name__ == "__main__":
    main()
