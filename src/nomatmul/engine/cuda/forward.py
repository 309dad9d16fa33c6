"""The forward pass over device weights: blocks of tokens of any mix of sequences.

Legend: S sequences, T tokens of all of them, L layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nomatmul.engine.cuda import fff, launch

if TYPE_CHECKING:
    from nomatmul.engine.cuda.weights import DeviceWeights
    from nomatmul.formats.config import ModelConfig


class Forward:
    """Launches the kernels of the general path. `flag` int32 [1] becomes 1 for values not finite.

    record: None, or a dict that takes every linear's int8 inputs and accumulators (for tests); of
    an FFF three pairs: (inputs, accumulators) of the walk, (rows, their int8), and of the sum.
    """

    def __init__(self, config: ModelConfig, weights: DeviceWeights) -> None:
        self.config = config
        self.weights = weights
        self.flag = torch.zeros(1, dtype=torch.int32, device=weights.device)
        self.record: dict[str, tuple[Any, Any]] | None = None

    def embed(self, ids_T: Any) -> Any:
        """float32 [T, D] of int32 ids on the device."""
        stack = self.weights.stack
        x_TD = stack["embedding"].index_select(0, ids_T).float()
        if "embedding_scale" in stack:
            x_TD *= stack["embedding_scale"].index_select(0, ids_T)[:, None]
        return x_TD

    def blocks(
        self, x_TD: Any, states_SLD: Any, stretches: launch.Stretches, scratch: Any = None
    ) -> Any:
        """Run all blocks, in place on x and on the states; return x of the last block."""
        added = None
        for layer in range(self.config.num_layers):
            added = self.mixer(layer, x_TD, added, states_SLD, stretches, scratch)
            added = self.channel(layer, x_TD, added, scratch)
        return self._add(x_TD, added)

    def block(self, layer: int, x_TD: Any, states_SLD: Any, stretches: launch.Stretches) -> Any:
        """One block alone, in place on x and the states."""
        added = self.mixer(layer, x_TD, None, states_SLD, stretches, None)
        return self._add(x_TD, self.channel(layer, x_TD, added, None))

    def mixer(
        self, layer: int, x_TD: Any, added: Any, states_SLD: Any, stretches: launch.Stretches,
        scratch: Any,
    ) -> tuple[Any, Any, float]:  # fmt: skip
        """MLGRU of one layer: what is to be added to x, as (accumulators, steps, scale)."""
        config, stack, beta = self.config, self.weights.stack, self.weights.beta
        at = f"layers.{layer}.mixer"
        row_bytes = stack["ifg"].shape[-1]
        inputs = launch.residual_norm(
            x_TD, added, stack["mixer_norm"][layer], config.norm_eps, stack["ifg_norm"][layer],
            config.linear_norm_eps, row_bytes, self.flag,
        )  # fmt: skip
        acc_3TD = launch.product(inputs, stack["ifg"][layer], scratch)
        for number, letter in enumerate("ifg"):
            self._note(f"{at}.{letter}_proj", inputs.q_CTK[number], acc_3TD[number])
        betas = (beta[f"{at}.i_proj"], beta[f"{at}.f_proj"], beta[f"{at}.g_proj"])
        i_TD, f_TD, g_TD = launch.gates(acc_3TD, inputs.step_CT, betas, stack["bound"][layer])
        launch.scan(i_TD, f_TD, states_SLD, layer, stretches)
        gated = launch.gate_norm(
            g_TD, i_TD, stack["g_norm"][layer], config.gate_norm_eps, stack["o_norm"][layer],
            config.linear_norm_eps, row_bytes, self.flag,
        )  # fmt: skip
        del i_TD, f_TD, g_TD, acc_3TD
        acc_1TD = launch.product(gated, stack["o"][layer], scratch)
        self._note(f"{at}.o_proj", gated.q_CTK[0], acc_1TD[0])
        return acc_1TD[0], gated.step_CT, beta[f"{at}.o_proj"]

    def channel(
        self, layer: int, x_TD: Any, added: Any, scratch: Any
    ) -> tuple[Any, Any, float]:  # fmt: skip
        """The channel mixer of one layer, as `mixer`; without one, `added` is still to be added."""
        if self.config.channel_mixer == "glu":
            return self._glu(layer, x_TD, added, scratch)
        if self.config.channel_mixer == "fff":
            return self._fff(layer, x_TD, added)
        return added

    def _fff(self, layer: int, x_TD: Any, added: Any) -> tuple[Any, Any, float]:
        config, stack, beta = self.config, self.weights.stack, self.weights.beta
        assert config.fff_trees is not None
        assert config.fff_depth is not None
        rows_V2R, name = stack["rows"][layer], f"layers.{layer}.channel.rows"
        inputs = launch.residual_norm(
            x_TD, added, stack["channel_norm"][layer], config.norm_eps,
            stack["norm_in"][layer][None], config.linear_norm_eps, rows_V2R.shape[-1], self.flag,
        )  # fmt: skip
        rows_TA, acc_TA = fff.walk(inputs, rows_V2R, config.fff_trees, config.fff_depth)
        q_TA, step_1T = fff.hidden(
            acc_TA, rows_TA, inputs.step_CT, beta[f"{name}.in"], stack["norm_out"][layer],
            config.linear_norm_eps, self.flag,
        )  # fmt: skip
        acc_TD = fff.combine(q_TA, rows_TA, rows_V2R, config.hidden_size)
        self._note(f"{name}.in", inputs.q_CTK[0], acc_TA)
        self._note(f"{name}.path", rows_TA, q_TA)
        self._note(f"{name}.out", q_TA, acc_TD)
        return acc_TD, step_1T, beta[f"{name}.out"]

    def _glu(
        self, layer: int, x_TD: Any, added: Any, scratch: Any
    ) -> tuple[Any, Any, float]:  # fmt: skip
        config, stack, beta = self.config, self.weights.stack, self.weights.beta
        at = f"layers.{layer}.channel"
        inputs = launch.residual_norm(
            x_TD, added, stack["channel_norm"][layer], config.norm_eps, stack["gate_norm"][layer],
            config.linear_norm_eps, stack["gate"].shape[-1], self.flag,
        )  # fmt: skip
        acc_1TM = launch.product(inputs, stack["gate"][layer], scratch)
        self._note(f"{at}.gate_proj", inputs.q_CTK[0], acc_1TM[0])
        hidden = launch.glu(
            acc_1TM[0], inputs.step_CT, beta[f"{at}.gate_proj"], stack["down_norm"][layer],
            config.linear_norm_eps, stack["down"].shape[-1], self.flag,
        )  # fmt: skip
        del acc_1TM
        acc_1TD = launch.product(hidden, stack["down"][layer], scratch)
        self._note(f"{at}.down_proj", hidden.q_CTK[0], acc_1TD[0])
        return acc_1TD[0], hidden.step_CT, beta[f"{at}.down_proj"]

    def head(self, x_TD: Any) -> Any:
        """float32 logits [T, V] of the last block's output."""
        config, stack = self.config, self.weights.stack
        inputs = launch.residual_norm(
            x_TD, None, stack["final_norm"][0], config.norm_eps, stack["head_norm"][0],
            config.linear_norm_eps, stack["head"].shape[-1], self.flag,
        )  # fmt: skip
        acc_TV = launch.product(inputs, stack["head"][0])[0]
        self._note("head", inputs.q_CTK[0], acc_TV)
        return acc_TV.float() * (inputs.step_CT[0] * self.weights.beta["head"])[:, None]

    def _add(self, x_TD: Any, added: tuple[Any, Any, float] | None) -> Any:
        if added is not None:
            acc, step, beta = added
            x_TD += acc.float() * (step[0] * beta)[:, None]
        return x_TD

    def _note(self, name: str, q_TK: Any, acc_TN: Any) -> None:
        if self.record is not None:
            self.record[name] = (q_TK.clone(), acc_TN.clone())
