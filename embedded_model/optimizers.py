"""The optimizers of the pretraining. `step(factor)` makes a step at that fraction of the full learning rate."""

import math

import torch

MUON_LR, MUON_WEIGHT_DECAY, ADAM_LR, ADAPTER_LR = 4e-3, 0.05, 4e-3, 2e-3
BETAS = (0.9, 0.95)
LARGEST_NORM = 1.0  # of all gradients that AdamW steps on; larger ones are scaled down to it


class Muon:
    """Momentum whose update of each matrix is made orthogonal, by five steps of Newton and Schulz.

    Keller Jordan's optimizer (github.com/KellerJordan/Muon). All matrices of a shape are stepped at once.
    """

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.groups = {}
        for matrix in matrices:
            self.groups.setdefault(tuple(matrix.shape), []).append(matrix)
        self.buffers = {s: torch.zeros(len(g), *s, device=g[0].device) for s, g in self.groups.items()}

    @staticmethod
    def orthogonalised(update):
        """float32 [matrices, rows, columns] -> the same shape, with singular values near 1."""
        x = update.bfloat16()
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            y = x @ x.mT
            x = 3.4445 * x + (-4.775 * y + 2.0315 * y @ y) @ x
        return (x.mT if tall else x).float()

    @torch.no_grad()
    def step(self, factor):
        for shape, matrices in self.groups.items():
            gradient, buffer = torch.stack([m.grad for m in matrices]), self.buffers[shape]
            buffer.mul_(self.momentum).add_(gradient)
            update = self.orthogonalised(gradient + self.momentum * buffer) * (0.2 * math.sqrt(max(shape)))
            lr = self.lr * factor
            values = torch.stack(list(matrices)) * (1 - lr * self.weight_decay) - lr * update
            torch._foreach_copy_(list(matrices), list(values.unbind(0)))


class ClippedAdam:
    """AdamW on these parameters, their gradients clipped to LARGEST_NORM."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr = list(parameters), lr
        fused = self.parameters[0].is_cuda
        self.adam = torch.optim.AdamW(self.parameters, lr, BETAS, weight_decay=0.0, fused=fused)

    def step(self, factor):
        torch.nn.utils.clip_grad_norm_(self.parameters, LARGEST_NORM)
        self.adam.param_groups[0]["lr"] = self.lr * factor
        self.adam.step()


class BaseOptimizer:
    """Muon for the matrices of the layers of a LlamaForCausalLM, AdamW for everything else."""

    def __init__(self, model):
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        in_layers = {id(p) for p in matrices}
        self.adam = ClippedAdam((p for p in model.parameters() if id(p) not in in_layers), ADAM_LR)
        self.muon = Muon(matrices, MUON_LR, MUON_WEIGHT_DECAY)

    def step(self, factor):
        self.adam.step(factor)
        self.muon.step(factor)


def adapter_optimizer(model):
    """AdamW for what a PeftModel trains."""
    return ClippedAdam((p for p in model.parameters() if p.requires_grad), ADAPTER_LR)
