"""One kind of problem per file (data, loss, metrics, example input); one source of images per file; augmentation."""
