"""The networks that "Be Your Own Teacher" trains on CIFAR (arXiv:1905.08094, table 1), registered with timm.

After `import timm_selfdistill`, `timm.list_models("cifar_*")` names them. Each takes images of 32 pixels, has one level
at the end of each quarter of the network besides its stem, and so gets four classifiers from `wrap_self_distill`.
"""

from . import cifar_resnet, cifar_resnetv2, cifar_vgg

__all__ = ["cifar_resnet", "cifar_resnetv2", "cifar_vgg"]
