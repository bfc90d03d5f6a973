"""Sequence networks in Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.support.networks.case import Case, expand, image, normal, tokens
from tests.support.networks.nnx_images import build


class EncoderBlock(nnx.Module):
    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, dropout_rate=0.1, deterministic=True, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(width, 2 * width, rngs=rngs),
            nnx.gelu,
            nnx.Linear(2 * width, width, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        width = 8
        self.patches = nnx.Conv(3, width, (4, 4), strides=(4, 4), padding="VALID", rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, width)))
        self.pos_embedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 5, width)))
        self.blocks = nnx.Sequential(*[EncoderBlock(width, 2, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.patches(x)
        batch, height, length, width = x.shape
        x = x.reshape(batch, height * length, width)
        cls = jnp.broadcast_to(self.cls[...], (batch, 1, width))
        x = jnp.concatenate([cls, x], axis=1) + self.pos_embedding[...]
        return self.head(self.norm(self.blocks(x))[:, 0])


class StackedEncoder(nnx.Module):
    """Blocks made by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make_block(rngs: nnx.Rngs) -> EncoderBlock:
            return EncoderBlock(8, 2, rngs=rngs)

        self.embed = nnx.Linear(4, 8, rngs=rngs)
        self.blocks = make_block(rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x: jax.Array, block: EncoderBlock) -> jax.Array:
            return block(x)

        return self.head(run(self.embed(x), self.blocks).mean(axis=1))


class LSTMClassifier(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(4, 6, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.rnn(x)[:, -1])


class SoftMixture(nnx.Module):
    """Every expert sees every token; a softmax router weighs their outputs."""

    def __init__(self, width: int, hidden: int, experts: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.router = nnx.Linear(width, experts, use_bias=False, rngs=rngs)
        self.up = nnx.Param(init(rngs.params(), (experts, width, hidden)))
        self.down = nnx.Param(init(rngs.params(), (experts, hidden, width)))

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        gate_BxTxE = nnx.softmax(self.router(x_BxTxD))
        hidden_BxTxExF = nnx.gelu(jnp.einsum("btd,edf->btef", x_BxTxD, self.up[...]))
        output_BxTxExD = jnp.einsum("btef,efd->bted", hidden_BxTxExF, self.down[...])
        return jnp.einsum("bted,bte->btd", output_BxTxExD, gate_BxTxE)


class MixtureNet(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.mixture = SoftMixture(8, 6, 3, rngs=rngs)
        self.head = nnx.LinearGeneral(8, (2, 3), rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        return self.head(x + self.mixture(self.norm(x)))


class MambaBlock(nnx.Module):
    """A selective state-space layer: its decay and input gate depend on the token."""

    def __init__(self, width: int, state: int, *, rngs: nnx.Rngs):
        inner = 2 * width
        self.state, self.rank = state, 2
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.in_proj = nnx.Linear(width, 2 * inner, use_bias=False, rngs=rngs)
        self.conv = nnx.Conv(
            inner, inner, (4,), padding="CAUSAL", feature_group_count=inner, rngs=rngs
        )
        self.x_proj = nnx.Linear(inner, self.rank + 2 * state, use_bias=False, rngs=rngs)
        self.dt_proj = nnx.Linear(self.rank, inner, rngs=rngs)
        steps = jnp.arange(1, state + 1, dtype=jnp.float32)
        self.A_log = nnx.Param(jnp.tile(jnp.log(steps)[None, :], (inner, 1)))
        self.D = nnx.Param(jnp.ones((inner,)))
        self.out_proj = nnx.Linear(inner, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        u_BxTxD, gate = jnp.split(self.in_proj(self.norm(x)), 2, axis=-1)
        u_BxTxD = nnx.silu(self.conv(u_BxTxD))
        splits = (self.rank, self.rank + self.state)
        dt, b_BxTxN, c_BxTxN = jnp.split(self.x_proj(u_BxTxD), splits, axis=-1)
        dt_BxTxD = nnx.softplus(self.dt_proj(dt))
        decay = jnp.exp(-jnp.exp(self.A_log[...])[None, None, :, :] * dt_BxTxD[..., None])
        write = (dt_BxTxD * u_BxTxD)[..., None] * b_BxTxN[:, :, None, :]

        def combine(
            left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            return left[0] * right[0], left[1] * right[0] + right[1]

        _, h_BxTxDxN = jax.lax.associative_scan(combine, (decay, write), axis=1)
        y = jnp.einsum("btdn,btn->btd", h_BxTxDxN, c_BxTxN)
        y = y + self.D[...][None, None, :] * u_BxTxD
        return x + self.out_proj(y * nnx.silu(gate))


class Mamba(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.block = MambaBlock(6, 4, rngs=rngs)
        self.norm = nnx.RMSNorm(6, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embed.attend(self.norm(self.block(self.embed(ids))))


class LoRANet(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.hidden = nnx.LoRALinear(6, 8, lora_rank=2, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.tanh(self.hidden(x)))


CASES = (
    Case(
        "nnx/vit",
        lambda: build(lambda: VisionTransformer(rngs=nnx.Rngs(0)), image(), as_state=True),
        expand(
            "{patches,head}/kernel/value",
            "blocks/layers/{0,1}/attention/{query,key,value,out}/kernel/value",
            "blocks/layers/{0,1}/mlp/layers/{0,2}/kernel/value",
        ),
        free=expand(
            "{cls,pos_embedding}/value",
            "blocks/layers/{0,1}/attention/{query,key,value}/bias/value",
        ),
    ),
    Case(
        "nnx/stacked_layers",
        lambda: build(lambda: StackedEncoder(rngs=nnx.Rngs(0)), normal(2, 5, 4)),
        expand(
            "{embed,head}/kernel",
            "blocks/attention/{query,key,value,out}/kernel",
            "blocks/mlp/layers/{0,2}/kernel",
        ),
        free=expand(
            "blocks/{norm1,norm2}/{scale,bias}",
            "blocks/attention/{query,key,value,out}/bias",
            "blocks/mlp/layers/{0,2}/bias",
        ),
    ),
    Case(
        "nnx/lstm",
        lambda: build(lambda: LSTMClassifier(rngs=nnx.Rngs(0)), normal(2, 5, 4)),
        expand("head/kernel", "rnn/cell/{hf,hg,hi,ho,if_,ig,ii,io}/kernel"),
    ),
    Case(
        "nnx/soft_mixture_of_experts",
        lambda: build(lambda: MixtureNet(rngs=nnx.Rngs(0)), tokens(2, 5)),
        expand("mixture/{up,down}", "mixture/router/kernel", "head/kernel"),
        free=expand("embed/embedding", "head/bias"),
    ),
    Case(
        "nnx/mamba",
        lambda: build(lambda: Mamba(rngs=nnx.Rngs(0)), tokens(2, 6)),
        expand("embed/embedding", "block/{in_proj,conv,x_proj,dt_proj,out_proj}/kernel"),
        free=expand("block/A_log"),
    ),
    Case(
        "nnx/lora",
        lambda: build(lambda: LoRANet(rngs=nnx.Rngs(0)), normal(2, 6)),
        expand("{hidden,head}/kernel", "hidden/lora/{lora_a,lora_b}"),
    ),
)
