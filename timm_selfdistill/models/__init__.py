"""The networks that "Be Your Own Teacher" trains on CIFAR (arXiv:1905.08094, table 1), registered with timm.

After `import timm_selfdistill`, `timm.list_models("cifar_*")` names them. Each takes images of 32 pixels, has one level
at the end of each quarter of the network besides its stem, and so gets four classifiers from `wrap_self_distill`.

Examples:
    >>> import timm
    >>> from timm_selfdistill import wrap_self_distill
    >>> len(timm.list_models("cifar_*"))
    10
    >>> wrap_self_distill(timm.create_model("cifar_resnet18", num_classes=100)).exits
    ('layer1', 'layer2', 'layer3', 'layer4')
"""

from . import cifar_resnet, cifar_resnetv2, cifar_vgg

__all__ = ["cifar_resnet", "cifar_resnetv2", "cifar_vgg"]
