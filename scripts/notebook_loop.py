"""The course notebook's loop as it is usually written, to be measured against.

    python scripts/notebook_loop.py FOLDER WEIGHTS.safetensors EPOCHS [PX] [head|all|all-bn-eval]

Plain torch and torchvision, nothing of featcache: a DataLoader over images in class folders,
ResNet18, accuracy on test after every epoch. Adam trains the new last layer of the frozen network,
or all of it, with or without BatchNorm in eval mode. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms


def main(folder: str, weights: str, num_epochs: int, side: int = 224, trains: str = "head") -> None:
    """Train and print what the notebook prints."""
    start = time.perf_counter()
    torch.manual_seed(42)
    usual = [
        transforms.ToTensor(),
        transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ]
    resize = transforms.Resize((side, side))
    mirrored = transforms.Compose([resize, transforms.RandomHorizontalFlip(), *usual])
    train = datasets.ImageFolder(f"{folder}/train", mirrored)
    test = datasets.ImageFolder(f"{folder}/test", transforms.Compose([resize, *usual]))
    train_batches = DataLoader(train, batch_size=32, shuffle=True)
    test_batches = DataLoader(test, batch_size=64)

    model = models.resnet18()
    state = {k: v.float() for k, v in load_file(weights).items() if not k.startswith("fc.")}
    model.load_state_dict(state, strict=False)
    for parameter in model.parameters():
        parameter.requires_grad = trains != "head"
    model.fc = nn.Linear(model.fc.in_features, len(train.classes))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    loss_function = nn.CrossEntropyLoss()

    epochs = []
    for epoch in range(num_epochs):
        epoch_start = time.perf_counter()
        model.train()
        for module in model.modules():
            if trains == "all-bn-eval" and isinstance(module, nn.BatchNorm2d):
                module.eval()
        for images, labels in train_batches:
            optimizer.zero_grad()
            loss = loss_function(model(images), labels)
            loss.backward()
            optimizer.step()
        model.eval()
        num_right = 0
        with torch.no_grad():
            for images, labels in test_batches:
                num_right += int((model(images).argmax(1) == labels).sum())
        seconds = time.perf_counter() - epoch_start
        epochs.append({"epoch": epoch + 1, "test_top1": num_right / len(test), "seconds": seconds})
    print(json.dumps({"epochs": epochs, "seconds_total": time.perf_counter() - start}))


if __name__ == "__main__":
    _, folder, weights, epochs, *more = sys.argv
    main(folder, weights, int(epochs), *map(int, more[:1]), *more[1:])
