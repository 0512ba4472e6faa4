"""Slow, plain float64 numpy versions of what TrueNorm computes. Imports nothing of TrueNorm."""

from __future__ import annotations

import numpy as np


def softmax(logits):
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def cross_entropy(logits, labels, weights=None, smoothing=0.0):
    """Mean cross entropy against (1 - smoothing) on the label and smoothing spread over all."""
    logits = np.asarray(logits, np.float64)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
    target = np.full(logits.shape, smoothing / logits.shape[1])
    target[np.arange(len(labels)), labels] += 1 - smoothing
    losses = -(target * np.log(softmax(logits))).sum(1)
    return (losses * weights).sum() / weights.sum()


def one_cycle(step, steps, peak, warmup):
    """From a tenth of the peak up to it, then down to zero, in straight lines."""
    return peak * np.interp(step / steps, [0, warmup, 1], [0.1, 1, 0])


class Adam:
    """Kingma and Ba 2015, algorithm 1; decay is L2, or decoupled (Loshchilov and Hutter 2019)."""

    def __init__(self, decay=0.0, decoupled=False):
        self.decay, self.decoupled, self.state = decay, decoupled, {}

    def step(self, name, value, grad, lr):
        m, v, t = self.state.get(name, (0.0, 0.0, 0))
        if self.decoupled:
            value = value - lr * self.decay * value
        else:
            grad = grad + self.decay * value
        t += 1
        m = 0.9 * m + 0.1 * grad
        v = 0.999 * v + 0.001 * grad**2
        self.state[name] = (m, v, t)
        return value - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


class Sgd:
    """SGD with Nesterov momentum 0.9 (Sutskever et al. 2013, in torch's form); L2 decay."""

    def __init__(self, decay=0.0):
        self.decay, self.state = decay, {}

    def step(self, name, value, grad, lr):
        grad = grad + self.decay * value
        velocity = 0.9 * self.state.get(name, 0.0) + grad
        self.state[name] = velocity
        return value - lr * (grad + 0.9 * velocity)


class Mlp:
    """Linear, batch norm, ReLU, linear, with the gradients written out by hand."""

    def __init__(self, state):
        self.p = {k: np.asarray(v, np.float64) for k, v in state.items()}
        self.momentum, self.eps = 0.1, 1e-5

    def forward(self, x, training):
        p = self.p
        h = x @ p["w1"].T
        if training:
            mean, var, n = h.mean(0), h.var(0), len(h)
            p["mean"] = (1 - self.momentum) * p["mean"] + self.momentum * mean
            p["var"] = (1 - self.momentum) * p["var"] + self.momentum * var * n / (n - 1)
        else:
            mean, var = p["mean"], p["var"]
        scale = 1 / np.sqrt(var + self.eps)
        normed = (h - mean) * scale
        active = normed * p["gamma"] + p["beta"]
        relu = np.maximum(active, 0)
        self.kept = x, normed, scale, active, relu
        return relu @ p["w2"].T + p["b2"]

    def gradients(self, logits, labels):
        x, normed, scale, active, relu = self.kept
        n = len(labels)
        d = softmax(logits)
        d[np.arange(n), labels] -= 1
        d /= n
        grads = {"w2": d.T @ relu, "b2": d.sum(0)}
        d = (d @ self.p["w2"]) * (active > 0)
        grads |= {"gamma": (d * normed).sum(0), "beta": d.sum(0)}
        d = d * self.p["gamma"]
        # Ioffe and Szegedy 2015, section 3: the statistics depend on the batch, too.
        d = scale * (d - d.mean(0) - normed * (d * normed).mean(0))
        return grads | {"w1": d.T @ x}

    def train(self, batches, rule, lr):
        """One update for each (x, labels) of ``batches``; the losses."""
        losses = []
        for x, labels in batches:
            logits = self.forward(x, training=True)
            losses.append(cross_entropy(logits, labels))
            for name, grad in self.gradients(logits, labels).items():
                self.p[name] = rule.step(name, self.p[name], grad, lr)
        return losses


def standardize(x):
    """Each column minus its mean, over its standard deviation; constant columns become zero."""
    x = np.asarray(x, np.float64)
    std = x.std(0)
    return (x - x.mean(0)) / np.where(std > 0, std, 1)


class BatchNorm:
    """Batch norm with a mask, ghost batches, renormalization and a least count, value by value.

    Statistics are tracked group after group, each with 1 - (1 - momentum)^(its share of the
    values), at momentum 1 and None by share; groups below ``min_count`` together, by their
    distance from the running mean.
    """

    def __init__(
        self, channels, *, momentum=0.1, eps=1e-5, ghost=None, renorm=None, min_count=None
    ):
        self.mean, self.var, self.batches = np.zeros(channels), np.ones(channels), 0
        self.momentum, self.eps, self.ghost = momentum, eps, ghost
        self.renorm, self.min_count = renorm, min_count  # renorm: (rmax, dmax)

    def groups(self, x):
        """The examples of each group; a last one of a single value joins the one before."""
        n, positions = len(x), int(np.prod(x.shape[2:]))
        size = self.ghost or max(n, 1)
        groups = [list(range(i, min(i + size, n))) for i in range(0, n, size)]
        if len(groups) > 1 and len(groups[-1]) * positions == 1:
            groups[-2:] = [groups[-2] + groups[-1]]
        return groups

    def forward(self, x, mask=None):
        """The normalized values of x (N, C, *S), zero where the mask (x's shape) is False."""
        x = np.asarray(x, np.float64)
        mask = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
        out, least = np.zeros(x.shape), self.min_count or 2
        after = self.mean.copy(), self.var.copy()
        seen = False
        for c in range(x.shape[1]):
            parts, few = [], []
            for group in self.groups(x):
                here = mask[group, c]
                values = x[group, c][here]
                if not len(values):
                    continue
                mean, var = values.mean(), values.var()
                if len(values) < least:
                    few.extend(values)
                    normed = (values - self.mean[c]) / np.sqrt(self.var[c] + self.eps)
                else:
                    parts.append((len(values), mean, values.var(ddof=1)))
                    std, running = np.sqrt(var + self.eps), np.sqrt(self.var[c] + self.eps)
                    normed = (values - mean) / std
                    if self.renorm is not None:
                        rmax, dmax = self.renorm
                        r = np.clip(std / running, 1 / rmax, rmax)
                        normed = normed * r + np.clip((mean - self.mean[c]) / running, -dmax, dmax)
                block = np.zeros(here.shape)
                block[here] = normed
                out[group, c] = block
            seen |= bool(parts or few)
            after[0][c], after[1][c] = self.track(self.mean[c], self.var[c], parts, few)
        if seen:
            (self.mean, self.var), self.batches = after, self.batches + 1
        return out

    def track(self, mean, var, parts, few):
        total = sum(n for n, _, _ in parts)
        old_mean, old_var = mean, var
        momentum = 1 / (self.batches + 1) if self.momentum is None else self.momentum
        if self.momentum is None or momentum == 1:
            shares = [momentum * n / total for n, _, _ in parts]
            mean = (1 - sum(shares)) * old_mean + sum(
                s * p[1] for s, p in zip(shares, parts, strict=True)
            )
            var = (1 - sum(shares)) * old_var + sum(
                s * p[2] for s, p in zip(shares, parts, strict=True)
            )
        else:
            for n, m, v in parts:
                weight = 1 - (1 - momentum) ** (n / total)
                mean, var = mean + weight * (m - mean), var + weight * (v - var)
        if few:
            if self.momentum is None:
                weight = 1 / (self.batches + 2)
            else:
                weight = 1 - (1 - momentum) ** min(1, len(few) / self.min_count)
            d = np.mean(few) - mean
            mean += weight * d
            var = (1 - weight) * var + weight * (np.var(few) + d**2 * (2 - weight) / 2)
        return mean, var


def batch_norm_with_gradients(x, grad, eps=1e-5):
    """Mean and biased variance of each channel of x (N, C, *S), its normalized values, and the
    gradients of sum(grad * normalized * weight + bias) at weight 1 and bias 0: of x, weight, bias.
    """
    x, grad = np.asarray(x, np.float64), np.asarray(grad, np.float64)
    axes = tuple(a for a in range(x.ndim) if a != 1)
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    scale = 1 / np.sqrt(var + eps)
    normed = (x - mean) * scale
    of_weight = (grad * normed).mean(axes, keepdims=True)
    of_x = scale * (grad - grad.mean(axes, keepdims=True) - normed * of_weight)
    count = x.size / x.shape[1]
    return mean.ravel(), var.ravel(), normed, of_x, of_weight.ravel() * count, grad.sum(axes)
