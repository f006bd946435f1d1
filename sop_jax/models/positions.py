"""Resize of learnt positional embeddings to other grids.

There are three rules, and features of trained weights agree only under the one that they were
trained with:

- `ibot`: cubic samples a scale of size / (new_size + 0.1) apart, not size / new_size (iBOT, DINO);
- `size`: cubic samples size / new_size apart (Hugging Face);
- `antialiased`: the same places, but averaged over all that a sample stands for, by a kernel that
  is a little softer and ends at the border (timm, and DINOv2 with registers).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

OFFSETS = {"ibot": 0.1, "size": 0.0}  # added to the new size
RULES = (*OFFSETS, "antialiased")


def cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' cubic convolution kernel; PyTorch's bicubic uses a = -0.75."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(size: int, new_size: int, rule: str) -> np.ndarray:
    """Interpolation weights [new_size, size] of a rule.

    Positions outside the grid repeat its border, but for `antialiased`, where they do not count.
    """
    if rule == "antialiased":
        scale = size / new_size
        centre = (np.arange(new_size)[:, None] + 0.5) * scale - 0.5
        # PyTorch and Pillow take this kernel where they antialias.
        matrix = cubic((np.arange(size) - centre) / max(scale, 1.0), a=-0.5)
        return matrix / matrix.sum(1, keepdims=True)
    centre = (np.arange(new_size) + 0.5) * size / (new_size + OFFSETS[rule]) - 0.5
    taps = np.floor(centre).astype(int)[:, None] + np.arange(-1, 3)  # [new_size, 4]
    weights = cubic(centre[:, None] - taps)
    matrix = np.zeros((new_size, size))
    rows = np.broadcast_to(np.arange(new_size)[:, None], taps.shape)
    np.add.at(matrix, (rows, np.clip(taps, 0, size - 1)), weights)
    return matrix


def resize_positions(
    positions: Float[Array, "h w D"], grid: tuple[int, int], rule: str
) -> Float[Array, "new_h new_w D"]:
    """The positional embeddings of another grid, by one of RULES."""
    if positions.shape[:2] == grid:
        return positions
    down = resize_matrix(positions.shape[0], grid[0], rule).astype(np.float32)
    across = resize_matrix(positions.shape[1], grid[1], rule).astype(np.float32)
    return jnp.einsum(
        "ih,jw,hwd->ijd", down, across, positions, precision=jax.lax.Precision.HIGHEST
    )
