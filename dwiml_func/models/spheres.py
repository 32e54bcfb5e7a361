"""Points on the sphere that stand for all directions."""

from __future__ import annotations

import torch
from torch import Tensor

from dwiml_func._checks import shown

__all__ = ["nearest_vertices", "sphere_vertices"]


def sphere_vertices(name: str = "symmetric724") -> Tensor:
    """The points of one of dipy's spheres.

    Args:
        name: symmetric362, symmetric642, symmetric724, repulsion100, repulsion200, repulsion724 or another of dipy's.

    Returns:
        (V, 3) float32, unit vectors, in dipy's order, which is that of the classes in dwi_ml's models.

    Raises:
        ValueError: dipy has no such sphere.

    Source: dipy, `dipy.data.get_sphere`; dwi_ml, `spheres.py`.

    Example:
        >>> sphere_vertices().shape
        torch.Size([724, 3])
    """
    from dipy.data import SPHERE_FILES, get_sphere

    if name not in SPHERE_FILES:
        raise ValueError(f"Expected a sphere among {', '.join(SPHERE_FILES)}. Received: {shown(name)}")
    return torch.tensor(get_sphere(name=name).vertices, dtype=torch.float32)


def nearest_vertices(directions: Tensor, vertices: Tensor) -> Tensor:
    """Find the vertex nearest to each direction, by one matrix product.

    Args:
        directions: (N, 3) float, of any length.
        vertices: (V, 3) float, unit vectors.

    Returns:
        (N,) int64, the first of the vertices at the least angle; 0 for a direction without length.

    Source: dwi_ml, `spheres.py`.

    Example:
        >>> nearest_vertices(torch.tensor([[0.1, 5, 0], [0, 0, -1]]), torch.cat([torch.eye(3), -torch.eye(3)]))
        tensor([1, 5])
    """
    return (directions @ vertices.to(directions).T).argmax(dim=-1)
