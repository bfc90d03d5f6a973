"""Attention and other sequence layers in plain `jax.numpy` and `jax.lax`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.support.networks.case import Built, Case, expand, normal, parameters, tokens

Params = dict[str, jax.Array]


def layer_norm(x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    x = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    return x * gain.reshape((1,) * (x.ndim - 1) + (-1,))


def einsum_attention() -> Built:
    """Kernels (D, H, K) into the heads and (H, K, D) out of them."""
    params = parameters(q=(8, 2, 4), k=(8, 2, 4), v=(8, 2, 4), o=(2, 4, 8), q_bias=(2, 4))

    def fn(params: Params, x_BxTxD: jax.Array) -> jax.Array:
        y_BxTxD = layer_norm(x_BxTxD)
        q_BxTxHxK = jnp.einsum("btd,dhk->bthk", y_BxTxD, params["q"]) + params["q_bias"][None, None]
        k_BxTxHxK = jnp.einsum("btd,dhk->bthk", y_BxTxD, params["k"])
        v_BxTxHxK = jnp.einsum("btd,dhk->bthk", y_BxTxD, params["v"])
        logits_BxHxTxS = jnp.einsum("bthk,bshk->bhts", q_BxTxHxK, k_BxTxHxK) / 2.0
        z_BxTxHxK = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits_BxHxTxS), v_BxTxHxK)
        return x_BxTxD + jnp.einsum("bthk,hkd->btd", z_BxTxHxK, params["o"])

    return fn, params, normal(2, 5, 8)


def library_attention() -> Built:
    """`jax.nn.dot_product_attention` with fewer key than query heads and a causal mask."""
    params = parameters(q=(8, 8), k=(8, 4), v=(8, 4), o=(8, 8))

    def fn(params: Params, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        y = layer_norm(x)
        q = (y @ params["q"]).reshape(batch, length, 4, 2)
        k = (y @ params["k"]).reshape(batch, length, 2, 2)
        v = (y @ params["v"]).reshape(batch, length, 2, 2)
        z = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return x + z.reshape(batch, length, width) @ params["o"]

    return fn, params, normal(2, 5, 8)


def fused_attention() -> Built:
    """The query, key and value kernels, concatenated into one matrix product."""
    params = parameters(query=(8, 8), key=(8, 8), value=(8, 8), out=(8, 8), bias=(24,))

    def fn(params: Params, x: jax.Array) -> jax.Array:
        kernel = jnp.concatenate([params["query"], params["key"], params["value"]], axis=1)
        heads = jnp.matmul(x, kernel) + params["bias"][None, None, :]
        heads = heads.reshape(*x.shape[:2], 3, 2, 4)
        q, k, v = (jnp.squeeze(head, 2) for head in jnp.split(heads, 3, axis=2))
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k), axis=-1)
        return jnp.einsum("bhts,bshk->bthk", weights, v).reshape(x.shape) @ params["out"]

    return fn, params, normal(2, 5, 8)


def rope(x: jax.Array) -> jax.Array:
    """Rotary embedding of (batch, length, ..., features), by interleaved pairs."""
    length, features = x.shape[1], x.shape[-1]
    frequency = 1.0 / (10_000.0 ** (jnp.arange(0, features, 2) / features))
    angle = jnp.outer(jnp.arange(length, dtype=jnp.float32), frequency)
    angle = angle.reshape((1, length) + (1,) * (x.ndim - 3) + (features // 2,))
    even, odd = x[..., ::2], x[..., 1::2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def grouped_query_decoder() -> Built:
    """A decoder with grouped queries, computed in bfloat16 from float32 parameters."""
    layer = {
        "q": (8, 2, 2, 4),
        "k": (8, 2, 4),
        "v": (8, 2, 4),
        "o": (2, 2, 4, 8),
        "gate": (8, 12),
        "up": (8, 12),
        "down": (12, 8),
        "norm1": (8,),
        "norm2": (8,),
    }
    params: dict[str, Any] = {
        "embedding": parameters(table=(11, 8))["table"],
        "layers": [parameters(**layer) for _ in range(2)],
        "norm": parameters(gain=(8,))["gain"],
        "unembed": parameters(kernel=(8, 11))["kernel"],
    }

    def attention(p: Params, x: jax.Array) -> jax.Array:
        q_BxTxGxHxK = rope(jnp.einsum("btd,dghk->btghk", x, p["q"]).astype(jnp.float32))
        k_BxTxGxK = rope(jnp.einsum("btd,dgk->btgk", x, p["k"]).astype(jnp.float32))
        v_BxTxGxK = jnp.einsum("btd,dgk->btgk", x, p["v"])
        logits_BxGxHxTxS = jnp.einsum("btghk,bsgk->bghts", q_BxTxGxHxK, k_BxTxGxK) * 4**-0.5
        causal = jnp.tril(jnp.ones(logits_BxGxHxTxS.shape[-2:], dtype=bool))
        logits_BxGxHxTxS = jnp.where(causal[None, None, None], logits_BxGxHxTxS, -2.4e38)
        weights_BxGxHxTxS = jax.nn.softmax(logits_BxGxHxTxS).astype(x.dtype)
        z_BxTxGxHxK = jnp.einsum("bghts,bsgk->btghk", weights_BxGxHxTxS, v_BxTxGxK)
        return jnp.einsum("btghk,ghkd->btd", z_BxTxGxHxK, p["o"])

    def fn(params: dict[str, Any], ids: jax.Array) -> jax.Array:
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        x = params["embedding"][ids] * 8**0.5
        for p in params["layers"]:
            x = x + attention(p, rms_norm(x, p["norm1"]))
            y = rms_norm(x, p["norm2"])
            x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        logits = (rms_norm(x, params["norm"]) @ params["unembed"]).astype(jnp.float32)
        return 30.0 * jnp.tanh(logits / 30.0)

    return fn, params, tokens(2, 6)


def patch_embedding() -> Built:
    """Patches by reshaping, a dense embedding, learned positions, mean pooling."""
    params = parameters(patches=(48, 8), pos_embedding=(1, 4, 8), widen=(8, 12), head=(12, 5))

    def fn(params: Params, image: jax.Array) -> jax.Array:
        n, h, w, c = image.shape
        x = image.reshape(n, h // 4, 4, w // 4, 4, c)
        x = jnp.moveaxis(x, 2, 3).reshape(n, (h // 4) * (w // 4), 16 * c)
        x = layer_norm(x @ params["patches"] + params["pos_embedding"])
        return (
            jnp.mean(jax.nn.gelu(x @ params["widen"], approximate=False), axis=1) @ params["head"]
        )

    return fn, params, normal(2, 8, 8, 3)


def token_shift() -> Built:
    """Tokens mixed with the one before (`jnp.take`, `jnp.roll`), in an RWKV channel mix."""
    params = parameters(
        key_mix=(1, 1, 6),
        gate_mix=(1, 1, 6),
        key=(6, 12),
        gate=(6, 6),
        value=(12, 6),
        circular=(6, 6),
    )

    def fn(params: Params, x: jax.Array) -> jax.Array:
        before = jnp.take(x, jnp.arange(x.shape[1]) - 1, axis=1, mode="clip")
        key = x * params["key_mix"] + before * (1 - params["key_mix"])
        gate = x * params["gate_mix"] + before * (1 - params["gate_mix"])
        hidden = jnp.square(jax.nn.relu(key @ params["key"]))
        x = x + jax.nn.sigmoid(gate @ params["gate"]) * (hidden @ params["value"])
        return jnp.roll(x, 2, axis=1) @ params["circular"]

    return fn, params, normal(2, 5, 6)


def gated_cumulative_sum() -> Built:
    """A gated linear recurrence, solved in closed form by cumulative sums."""
    params = parameters(
        value=(6, 8), decay=(6, 8), gate=(6, 8), out=(8, 6), embedding=(11, 6), head=(6, 11)
    )

    def fn(params: Params, ids: jax.Array) -> jax.Array:
        x = jnp.take(params["embedding"], ids, axis=0)
        y = layer_norm(x)
        log_decay = jnp.cumsum(-jax.nn.softplus(y @ params["decay"]), axis=1)
        write = jax.nn.silu(y @ params["value"]) * jnp.exp(-log_decay)
        hidden = jnp.exp(log_decay) * jnp.cumsum(write, axis=1)
        x = x + (hidden * jax.nn.silu(y @ params["gate"])) @ params["out"]
        return x @ params["head"]

    return fn, params, tokens(2, 6)


def soft_mixture() -> Built:
    """Experts weighed by a softmax router, all in one einsum, with a load-balancing output."""
    params = parameters(router=(6, 3), up=(3, 6, 8), up_bias=(3, 8), down=(3, 8, 6))

    def fn(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = jax.nn.softmax(x @ params["router"], axis=-1)
        hidden = jnp.einsum("nd,edf->enf", x, params["up"]) + params["up_bias"][:, None, :]
        y = jnp.einsum("ne,enf,efd->nd", weights, jnp.tanh(hidden), params["down"])
        return y, 3 * jnp.sum(jnp.square(jnp.mean(weights, axis=0)))

    return fn, params, normal(4, 6)


def routed_experts_decoder() -> Built:
    """A causal decoder of which each token visits two of three experts, by `lax.ragged_dot`.

    Tokens are sorted by expert, multiplied by their experts' kernels, and put back by `at[].add`.
    """
    layer = {
        "qkv": (8, 24),
        "o": (8, 8),
        "router": (8, 3),
        "up": (3, 8, 12),
        "down": (3, 12, 8),
        "norm": (8,),
    }
    params: dict[str, Any] = {
        "embedding": parameters(table=(11, 8))["table"],
        "layers": [parameters(**layer) for _ in range(2)],
        "unembed": parameters(kernel=(8, 11))["kernel"],
    }

    def attention(p: Params, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split((x @ p["qkv"]).reshape(*x.shape[:2], 2, 12), 3, axis=-1)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ p["o"]

    def experts(p: Params, x: jax.Array) -> jax.Array:
        weights, chosen = lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        order = jnp.argsort(chosen.ravel())
        token = order // 2
        sizes = jnp.bincount(chosen.ravel(), length=3)
        hidden = jax.nn.silu(lax.ragged_dot(x[token], p["up"], sizes))
        y = lax.ragged_dot(hidden, p["down"], sizes) * weights.ravel()[order][:, None]
        return jnp.zeros_like(x).at[token].add(y)

    def fn(params: dict[str, Any], ids: jax.Array) -> jax.Array:
        x = params["embedding"][ids]
        for p in params["layers"]:
            x = x + attention(p, rms_norm(x, p["norm"]))
            x = x + experts(p, rms_norm(x, p["norm"]).reshape(-1, 8)).reshape(x.shape)
        return x @ params["unembed"]

    return fn, params, tokens(2, 5)


def diagonal_state_space() -> Built:
    """S5 layers: complex kernels from real leaves, a diagonal recurrence as a parallel scan."""
    layer = {"b": (4, 6, 2), "c": (6, 4, 2), "decay": (4,), "angle": (4,), "skip": (6,)}
    params: dict[str, Any] = {
        "encoder": parameters(kernel=(3, 6))["kernel"],
        "layers": [{**parameters(**layer), "gate": parameters(k=(6, 6))["k"]} for _ in range(2)],
        "head": parameters(kernel=(6, 5))["kernel"],
    }

    def combine(
        before: tuple[jax.Array, jax.Array], after: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return after[0] * before[0], after[0] * before[1] + after[1]

    def states(p: Params, u_TxH: jax.Array) -> jax.Array:
        eigenvalue = lax.complex(-jnp.exp(p["decay"]), p["angle"])
        kept = jnp.exp(eigenvalue / 10)
        b_PxH = ((kept - 1) / eigenvalue)[:, None] * lax.complex(p["b"][..., 0], p["b"][..., 1])
        drive_TxP = u_TxH.astype(jnp.complex64) @ b_PxH.T
        _, states_TxP = lax.associative_scan(
            combine, (jnp.broadcast_to(kept, drive_TxP.shape), drive_TxP)
        )
        c_HxP = lax.complex(p["c"][..., 0], p["c"][..., 1])
        return 2 * (states_TxP @ c_HxP.T).real + p["skip"][None] * u_TxH

    def fn(params: dict[str, Any], x: jax.Array) -> jax.Array:
        x = x @ params["encoder"]
        for p in params["layers"]:
            y = jax.nn.gelu(jax.vmap(states, in_axes=(None, 0))(p, layer_norm(x)))
            x = x + y * jax.nn.sigmoid(y @ p["gate"])
        return jnp.mean(x, axis=1) @ params["head"]

    return fn, params, normal(2, 6, 3)


CASES = (
    Case("plain/einsum_attention", einsum_attention, expand("{q,k,v,o}"), free=expand("q_bias")),
    Case("plain/library_attention", library_attention, expand("{q,k,v,o}")),
    Case("plain/fused_attention", fused_attention, expand("{query,key,value,out}")),
    Case(
        "plain/grouped_query_decoder",
        grouped_query_decoder,
        expand("unembed", "layers/{0,1}/{q,k,v,o,gate,up,down}"),
        free=expand("embedding"),
    ),
    Case(
        "plain/patch_embedding",
        patch_embedding,
        expand("{patches,widen,head}"),
        free=expand("pos_embedding"),
    ),
    Case(
        "plain/token_shift",
        token_shift,
        expand("{key,gate,value,circular}"),
        free=expand("{key,gate}_mix"),
    ),
    Case(
        "plain/gated_cumulative_sum",
        gated_cumulative_sum,
        expand("{value,decay,gate,out,head}"),
        free=expand("embedding"),
    ),
    Case("plain/soft_mixture", soft_mixture, expand("{router,up,down}"), free=expand("up_bias")),
    Case(
        "plain/routed_experts_decoder",
        routed_experts_decoder,
        expand("unembed", "layers/{0,1}/{qkv,o,router,up,down}"),
        free=expand("embedding"),
    ),
    Case(
        "plain/diagonal_state_space",
        diagonal_state_space,
        expand("{encoder,head}", "layers/{0,1}/{b,c,gate}"),
    ),
)
