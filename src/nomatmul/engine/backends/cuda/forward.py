"""The forward pass over device weights: blocks of tokens of any mix of sequences.

Legend: S sequences, T tokens of all of them, L layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nomatmul.engine.backends.cuda import fff, launch
from nomatmul.engine.backends.cuda.nvrtc import CompileError
from nomatmul.engine.backends.cuda.prompt import Prompt

if TYPE_CHECKING:
    from nomatmul.engine.backends.cuda.weights import DeviceWeights
    from nomatmul.formats.architecture import FFF

# int32 accumulators [T, D], their steps [1, T] and their scale: what x still lacks
Added = tuple[Tensor, Tensor, float]


class Forward:
    """Launches the kernels of the general path. `flag` int32 [1] becomes 1 for values not finite.

    record: None, or a dict that takes every linear's int8 inputs and accumulators (for tests); of
    an FFF three pairs: (inputs, accumulators) of the walk, (rows, their int8), and of the sum.
    """

    def __init__(self, weights: DeviceWeights) -> None:
        self.weights, self.plan = weights, weights.plan
        self.flag = torch.zeros(1, dtype=torch.int32, device=weights.device)
        self.record: dict[str, tuple[Tensor, Tensor]] | None = None
        self.prompt = self._compiled()

    def _compiled(self) -> Prompt | None:
        """None where NVRTC is missing or the sizes are odd: the triton kernels serve all."""
        if self.weights.device.type != "cuda":
            return None
        try:
            with torch.cuda.device(self.weights.device):
                return Prompt(self.plan, self.weights.device)
        except CompileError:
            return None

    def embed(self, ids_T: Tensor) -> Tensor:
        """float32 [T, D] of int32 ids on the device."""
        stack = self.weights.stack
        x_TD = stack["embedding"].index_select(0, ids_T).float()
        if "embedding_scale" in stack:
            x_TD *= stack["embedding_scale"].index_select(0, ids_T)[:, None]
        return x_TD

    def blocks(
        self,
        x_TD: Tensor,
        states_SLD: Tensor,
        stretches: launch.Stretches,
        scratch: Tensor | None = None,
    ) -> Tensor:
        """Run all blocks, in place on x and on the states; return x of the last block."""
        added: list[Added] = []  # taken out by who adds it, so that its memory is free from then on
        for layer in range(self.plan.layers):
            added.append(self.mixer(layer, x_TD, added, states_SLD, stretches, scratch))
            self.channel(layer, x_TD, added, scratch)
        return self._add(x_TD, added)

    def mixer(
        self, layer: int, x_TD: Tensor, added: list[Added], states_SLD: Tensor,
        stretches: launch.Stretches, scratch: Tensor | None
    ) -> Added:  # fmt: skip
        """MLGRU of one layer: what is to be added to x, as (accumulators, steps, scale)."""
        plan, stack, w_scale = self.plan, self.weights.stack, self.weights.w_scale
        at, row_bytes = f"layers.{layer}.mixer", stack["ifg"].shape[-1]
        w_scales = w_scale[f"{at}.i_proj"], w_scale[f"{at}.f_proj"], w_scale[f"{at}.g_proj"]
        prompt = self._prompt(len(x_TD), stretches.longest)
        inputs = self._norm(
            prompt, x_TD, added, stack["mixer_norm"][layer], stack["ifg_norm"][layer], row_bytes
        )
        acc_3TD = self.product(inputs, stack["ifg"][layer], scratch)
        for number, letter in enumerate("ifg"):
            self._note(f"{at}.{letter}_proj", inputs.q_CTK[number], acc_3TD[number])
        norms = stack["g_norm"][layer], stack["o_norm"][layer]
        if prompt is not None:
            h_TD = prompt.scan(
                acc_3TD, inputs.step_CT, w_scales, stack["bound"][layer], states_SLD[:, layer],
                stretches,
            )  # fmt: skip
            gated = prompt.gate_norm(
                acc_3TD[2], inputs.step_CT[2], w_scales[2], h_TD, *norms, row_bytes, self.flag
            )
            del h_TD
        else:
            bound_D = stack["bound"][layer]
            i_TD, f_TD, g_TD = launch.gates(acc_3TD, inputs.step_CT, w_scales, bound_D)
            launch.scan(i_TD, f_TD, states_SLD, layer, stretches)
            gated = launch.gate_norm(
                g_TD, i_TD, norms[0], plan.gate_eps, norms[1], plan.linear_eps,
                row_bytes, self.flag,
            )  # fmt: skip
            del i_TD, f_TD, g_TD
        del acc_3TD, inputs
        acc_1TD = self.product(gated, stack["o"][layer], scratch)
        self._note(f"{at}.o_proj", gated.q_CTK[0], acc_1TD[0])
        return acc_1TD[0], gated.step_CT, w_scale[f"{at}.o_proj"]

    def channel(self, layer: int, x_TD: Tensor, added: list[Added], scratch: Tensor | None) -> None:
        """The channel mixer of one layer, as `mixer`, but in the place of what `added` holds.

        Without one that is still to be added.
        """
        if self.plan.glu is not None:
            added.append(self._glu(layer, x_TD, added, scratch))
        if self.plan.trees is not None:
            added.append(self._fff(self.plan.trees, layer, x_TD, added))

    def _prompt(self, tokens: int, longest: int = launch.UNPACK_TOKENS) -> Prompt | None:
        """The kernels of long blocks, where they can run."""
        if tokens < launch.UNPACK_TOKENS or longest < launch.SCAN_TOKENS:
            return None
        return self.prompt

    def _norm(
        self, prompt: Prompt | None, x_TD: Tensor, added: list[Added], norm_D: Tensor,
        norm_CD: Tensor, row_bytes: int
    ) -> launch.Quantised:  # fmt: skip
        """Take what is `added`, add it to x, and return x's int8 for C linears."""
        taken, plan = added.pop() if added else None, self.plan
        if prompt is not None:
            return prompt.norm(x_TD, taken, norm_D, norm_CD, row_bytes, self.flag)
        return launch.residual_norm(
            x_TD, taken, norm_D, plan.norm_eps, norm_CD, plan.linear_eps, row_bytes,
            self.flag,
        )  # fmt: skip

    def product(self, inputs: launch.Quantised, w_CNR: Tensor, scratch: Tensor | None) -> Tensor:
        """Exact int32 accumulators [C, T, N]; scratch: int8 for unpacked matrices, or None."""
        prompt = self._prompt(inputs.q_CTK.shape[1])
        if prompt is not None and scratch is not None:
            return prompt.product(inputs, w_CNR, scratch)
        return launch.product(inputs, w_CNR)

    def _fff(self, trees: FFF, layer: int, x_TD: Tensor, added: list[Added]) -> Added:
        plan, stack, w_scale = self.plan, self.weights.stack, self.weights.w_scale
        rows_V2R, name = stack["rows"][layer], f"layers.{layer}.channel.rows"
        inputs = self._norm(
            self._prompt(len(x_TD)), x_TD, added, stack["channel_norm"][layer],
            stack["norm_in"][layer][None], rows_V2R.shape[-1],
        )  # fmt: skip
        rows_TA, acc_TA = fff.walk(inputs, rows_V2R, trees.trees, trees.depth)
        q_TA, step_1T = fff.hidden(
            acc_TA, rows_TA, inputs.step_CT, w_scale[f"{name}.in"], stack["norm_out"][layer],
            plan.linear_eps, self.flag,
        )  # fmt: skip
        acc_TD = fff.combine(q_TA, rows_TA, rows_V2R, plan.size)
        self._note(f"{name}.in", inputs.q_CTK[0], acc_TA)
        self._note(f"{name}.path", rows_TA, q_TA)
        self._note(f"{name}.out", q_TA, acc_TD)
        return acc_TD, step_1T, w_scale[f"{name}.out"]

    def _glu(self, layer: int, x_TD: Tensor, added: list[Added], scratch: Tensor | None) -> Added:
        plan, stack, w_scale = self.plan, self.weights.stack, self.weights.w_scale
        at = f"layers.{layer}.channel"
        scales = w_scale[f"{at}.gate_proj"], w_scale[f"{at}.down_proj"]
        w_1NR, row_bytes = stack["gate"][layer], stack["down"].shape[-1]
        prompt = self._prompt(len(x_TD))
        inputs = self._norm(
            prompt, x_TD, added, stack["channel_norm"][layer], stack["gate_norm"][layer],
            w_1NR.shape[-1],
        )  # fmt: skip
        if prompt is not None and scratch is not None:
            if self.record is not None:  # the fused product keeps its accumulators to itself
                acc_1TM = prompt.product(inputs, w_1NR, scratch)
                self._note(f"{at}.gate_proj", inputs.q_CTK[0], acc_1TM[0])
            y_TM = prompt.glu(inputs, w_1NR[0], scales[0], scratch)
            del inputs
            hidden = prompt.glu_norm(y_TM, stack["down_norm"][layer], row_bytes, self.flag)
            del y_TM
        else:
            acc_1TM = launch.product(inputs, w_1NR)
            self._note(f"{at}.gate_proj", inputs.q_CTK[0], acc_1TM[0])
            hidden = launch.glu(
                acc_1TM[0], inputs.step_CT, scales[0], stack["down_norm"][layer],
                plan.linear_eps, row_bytes, self.flag,
            )  # fmt: skip
            del acc_1TM
        acc_1TD = self.product(hidden, stack["down"][layer], scratch)
        self._note(f"{at}.down_proj", hidden.q_CTK[0], acc_1TD[0])
        return acc_1TD[0], hidden.step_CT, scales[1]

    def head(self, x_TD: Tensor) -> Tensor:
        """float32 logits [T, V] of the last block's output."""
        plan, stack = self.plan, self.weights.stack
        inputs = launch.residual_norm(
            x_TD, None, stack["final_norm"][0], plan.norm_eps, stack["head_norm"][0],
            plan.linear_eps, stack["head"].shape[-1], self.flag,
        )  # fmt: skip
        acc_TV = launch.product(inputs, stack["head"][0])[0]
        self._note("head", inputs.q_CTK[0], acc_TV)
        return acc_TV.float() * (inputs.step_CT[0] * self.weights.w_scale["head"])[:, None]

    def _add(self, x_TD: Tensor, added: list[Added]) -> Tensor:
        for acc, step, w_scale in added:
            x_TD += acc.float() * (step[0] * w_scale)[:, None]
        return x_TD

    def _note(self, name: str, q_TK: Tensor, acc_TN: Tensor) -> None:
        if self.record is not None:
            self.record[name] = (q_TK.clone(), acc_TN.clone())
