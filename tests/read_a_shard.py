"""Reads one rank's part of a tensor in a process of its own, and prints what that took.

read_a_shard.py FILE E_START E_STOP I_START I_STOP
"""

import sys

import paddle

from paddle_moe.params import Part
from paddle_moe.tensor_files import Plan, Source, Target, TensorFiles, execute

path, *numbers = sys.argv[1:]
e_start, e_stop, i_start, i_stop = map(int, numbers)
files = TensorFiles(path)
experts, hidden, columns = files["w"].shape
dense = {"E": (0, experts), "H": (0, hidden), "G": (0, 2), "I": (0, columns // 2)}
part = Part("E H (G I)", {**dense, "E": (e_start, e_stop), "I": (i_start, i_stop)})
target = Target(paddle.empty(part.shape), part)
report = execute([Plan(files, {"w": target}, [Source("w", "w", Part("E H (G I)", dense))], path=path)], path)

with open("/proc/self/smaps") as smaps:  # pages of the file that this process has touched
    mappings = smaps.read().split(path)[1:]
touched = sum(int(mapping.partition("Rss:")[2].split()[0]) * 1024 for mapping in mappings)
print(report.bytes_read, touched, float(target.tensor.astype("float64").sum()))
