"""A user's model and its files.

In: an ``nn.Module``, or a name and a weights file. Out: a float32 working copy that returns plain
logits (`wrapper`), the images that it expects (`input_spec`, `infer_spec`), its classes
(`class_indices`), and its weights: hashed and replaced (`parameters`), read and written
(`checkpoint`, `delta`). `kinds` refuses what can't be trained; `probe` runs the copy on a few
images to see what it returns (`outputs`, `squashing`). `loading` and `zoo` build models by name.
Read `prepare` first.
"""
