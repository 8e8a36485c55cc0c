"""PPO on a small environment, written here: carts that are pushed to stay in the middle of a track."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

import everystep  # added

UPDATES, CARTS, HORIZON, PASSES, PIECES = 14, 6, 8, 2, 2
DISCOUNT, TRACE, CLIP = 0.97, 0.9, 0.2


class Carts:
    """Several carts; each has a place and a speed, and is pushed left, right or not at all."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.state = self.random.normal(0, 0.5, (CARTS, 2))
        self.ages = [0] * CARTS
        self.finished = []

    def observe(self):
        return torch.tensor(self.state, dtype=torch.float32)

    def push(self, actions):
        """Return the rewards, and which carts have left the track and begin again."""
        pushes = (actions.numpy() - 1) * 0.15 + self.random.normal(0, 0.02, CARTS)
        self.state[:, 1] = 0.95 * self.state[:, 1] + pushes + 0.05 * self.state[:, 0]
        self.state[:, 0] += self.state[:, 1]
        done = np.abs(self.state[:, 0]) > 2
        rewards = 1 - np.abs(self.state[:, 0])
        for cart in range(CARTS):
            self.ages[cart] += 1
            if done[cart]:
                self.finished.append(self.ages[cart])
                self.state[cart], self.ages[cart] = self.random.normal(0, 0.5, 2), 0
        return torch.tensor(rewards, dtype=torch.float32), torch.tensor(done, dtype=torch.float32)


class ActorCritic(nn.Module):
    def __init__(self, hidden=24):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, hidden), nn.Tanh())
        self.policy, self.value = nn.Linear(hidden, 3), nn.Linear(hidden, 1)

    def forward(self, observed):
        features = self.body(observed)
        return Categorical(logits=self.policy(features)), self.value(features).squeeze(-1)


@torch.no_grad()
def rollout(carts, agent):
    """Play; return observations, actions, their log-probabilities, advantages and returns."""
    played = []
    for _ in range(HORIZON):
        observed = carts.observe()
        policy, value = agent(observed)
        action = policy.sample()
        played.append((observed, action, policy.log_prob(action), value, *carts.push(action)))
    following, advantage, advantages = agent(carts.observe())[1], torch.zeros(CARTS), []
    for _, _, _, value, reward, done in reversed(played):
        advantage = reward + (1 - done) * DISCOUNT * (following + TRACE * advantage) - value
        advantages.insert(0, advantage)
        following = value
    observed, actions, chances, values, rewards, _ = (
        torch.stack(each) for each in zip(*played, strict=True)
    )
    advantages = torch.stack(advantages)
    found = observed, actions, chances, advantages, advantages + values
    return [each.flatten(0, 1) for each in found], rewards.mean().item()


torch.manual_seed(8)
carts, agent = Carts(seed=8), ActorCritic()
optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2, eps=1e-5)

parts = {"agent": agent, "optimizer": optimizer, "carts": carts}  # added
with everystep.record(**parts, run="./run", resume=True) as recording:  # added
    for update in recording.steps(range(UPDATES)):  # was: range(UPDATES)
        played, reward = rollout(carts, agent)
        for _ in range(PASSES):
            for chosen in torch.randperm(CARTS * HORIZON).chunk(PIECES):
                observed, actions, before, advantages, returns = (each[chosen] for each in played)
                policy, value = agent(observed)
                ratio = (policy.log_prob(actions) - before).exp()
                normed = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                gain = torch.min(ratio * normed, clipped * normed).mean()
                loss = 0.5 * (value - returns).pow(2).mean() - gain - 0.01 * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        print(
            f"update {update}: reward {reward:.5f}, loss {loss.item():.6f}, {len(carts.finished)} lost"
        )
        if update % 4 == 3:
            torch.save({"agent": agent.state_dict(), "update": update}, f"agent-{update}.pt")
        recording.log(loss=loss, reward=reward)  # added

Path("ages.json").write_text(json.dumps(carts.finished))
