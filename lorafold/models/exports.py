"""Adapters in the formats of other tools: PEFT folders, llama.cpp's GGUF adapters and MLX's adapter folders.

A QA-LoRA adapter is an ordinary LoRA once A is repeated over each group, so it can be applied at run time wherever
LoRA can. GGUF layout: llama.cpp, src/llama-adapter.cpp: per target `<tensor>.lora_a` [r, in] and `<tensor>.lora_b`
[out, r], applied as alpha / r * B A, or as B A where alpha is 0.
"""

from __future__ import annotations

import errno
import json
import re
from contextlib import closing
from pathlib import Path

import torch
from gguf import GGUFWriter
from torch import Tensor, nn
from torch.nn import functional

from lorafold.adapters.adapted import AdaptedLayer, adapted_layers, carriers
from lorafold.adapters.group import GroupAdapter
from lorafold.adapters.lora import LoRA
from lorafold.adapters.parameters import AdaptedParameter
from lorafold.adapters.tied import follows, taken_apart
from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError, FormatError, bullet_list
from lorafold.files import replacing, replacing_folder
from lorafold.models.adapter_files import CONFIG, MLX_WEIGHTS, save_adapter, write_adapter_folder
from lorafold.models.gguf_file import GGUFFile
from lorafold.models.load import LoadedModel
from lorafold.models.peft_format import stored_config, stored_names, stored_tensors
from lorafold.models.tensors import save_tensors
from lorafold.quant.linear import QuantLinear


def lora_pairs(
    loaded: LoadedModel, name: str = "default", parameters: bool = False
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Every adapted layer as an ordinary LoRA: A [r, in], B [out, r] and its scaling s (delta = s B A).

    Where offsets are learned directly, or the file stores them coarsely (K-quants in place, bfloat16), the update that
    was realized is what counts: row g of A marks the inputs of group g, and B is that update.

    Args:
        parameters: there may be adapters of parameters too, which the caller sees to.

    Raises:
        AdapterError: there is more than that.
    """
    pairs = {}
    held = [path for path, c in carriers(loaded.model) if isinstance(c, AdaptedParameter) and name in c.adapters]
    odd = [] if parameters else [f"{path}: no layer's weight" for path in held]
    for path, layer in adapted_layers(loaded.model):
        if name not in layer.adapters:
            continue
        adapter, linear = layer.adapters[name], isinstance(layer.base, nn.Linear | QuantLinear)
        if follows(adapter):
            odd.append(f"{path}: the embedding's update")
        elif not linear or (isinstance(adapter, LoRA) and adapter.dora):
            odd.append(f"{path}: {'DoRA' if linear else type(layer.base).__name__}")
        elif isinstance(adapter, LoRA):
            pairs[path] = (*(factor.detach() for factor in adapter.factors()), adapter.scaling)
        elif isinstance(adapter, GroupAdapter):
            assert isinstance(layer.base, QuantLinear)
            if adapter.learns_scale:
                raise AdapterError(
                    "an update of scales differs from weight to weight inside a group, so it is no LoRA of low rank "
                    "and cannot be exported; fold it into the file instead (lorafold fold)"
                )
            if adapter.full or layer.base.packed.format.coarse:
                pairs[path] = (adapter.group_marks(), _realized(layer, adapter), 1.0)
            else:
                pairs[path] = (*adapter.expanded(), adapter.scaling)
    if odd:
        raise AdapterError(
            "such an adapter holds nothing but LoRA of linear layers, and here there is more:\n"
            + bullet_list(odd[:8] + ([f"and {len(odd) - 8} more"] if len(odd) > 8 else []))
            + "\nfold it into a model (lorafold fold), or export LoRA for peft"
        )
    return pairs


def _runtime_pairs(loaded: LoadedModel, name: str) -> dict[str, tuple[Tensor, Tensor, float]]:
    """`lora_pairs` for a runtime, to which a head with the embedding's weight is no layer of its own."""
    pairs, ends = lora_pairs(loaded, name), taken_apart(loaded.model)
    if ends is not None and ends[1] in pairs:
        raise AdapterError(
            f"{ends[1]} has the weight of {ends[0]} in {loaded.path.name}, so a runtime knows no layer of that name; "
            "fold the adapter into the model instead (lorafold fold)"
        )
    return pairs


@torch.no_grad()
def _realized(layer: AdaptedLayer, adapter: GroupAdapter) -> Tensor:
    """Offset update [out, groups] after rounding to the file's storage type."""
    assert isinstance(layer.base, QuantLinear)
    packed = layer.base.packed
    stored = packed.format.offset(packed.blocks)
    update = adapter.offset_update()
    assert update is not None
    return packed.format.move_offset(stored, update) - stored


def export_peft(loaded: LoadedModel, spec: AdapterSpec, folder: Path, name: str = "default") -> None:
    """Write a folder that `PeftModel.from_pretrained` reads; QA-LoRA is expanded (`rank_pattern` if ranks differ).

    Raises:
        OutputError: it cannot be written.
    """
    if spec.method != "qa-lora":
        return save_adapter(folder, loaded, spec, name)
    pairs = lora_pairs(loaded, name, parameters=True)
    ranks = {path: a.shape[0] for path, (a, _, _) in pairs.items()}
    alphas = {path: scaling * ranks[path] for path, (_, _, scaling) in pairs.items()}
    first = next(iter(pairs))
    config = {
        "peft_type": "LORA",
        "task_type": stored_config(loaded.model, spec, name)["task_type"],
        "base_model_name_or_path": str(loaded.path),
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {p: r for p, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {p: a for p, a in alphas.items() if a != alphas[first]},
        "lora_dropout": 0.0,
        "target_modules": sorted(pairs),
        "bias": "none",
        "modules_to_save": list(spec.modules_to_save) or None,
        "inference_mode": True,
    }
    stored = stored_tensors(loaded.model, name)
    whole = [key for own, key in stored_names(loaded.model, name).items() if own.endswith(".change")]
    tensors = {key: stored[key] for key in whole}
    for path, (a, b, _) in pairs.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.contiguous()
    return write_adapter_folder(folder, config, tensors, {"format": "pt", "base_weights_sha256": loaded.weights_hash()})


def export_gguf_adapter(loaded: LoadedModel, path: Path, name: str = "default") -> None:
    """Write a GGUF adapter that llama.cpp applies to the base file at run time (`--lora`), in float32.

    Raises:
        AdapterError: the base is not a GGUF file, so its tensor names are not known, or has none for a head.
        OutputError: it cannot be written.
    """
    if loaded.gguf is None:
        raise AdapterError(
            "a GGUF adapter needs a GGUF base, whose tensor names it uses; export with --to peft instead"
        )
    pairs = _runtime_pairs(loaded, name)
    with replacing(path) as temporary:
        with closing(GGUFWriter(temporary, loaded.gguf.architecture)) as writer:
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", 0.0)  # the scaling is inside B, since ranks may differ
            for module, (a, b, scaling) in pairs.items():
                binding = loaded.bindings[module]
                b = b * scaling
                if binding.row_order is not None:
                    b = b[binding.row_order.argsort().to(b.device)]
                writer.add_tensor(f"{binding.tensor}.lora_a", a.float().cpu().contiguous().numpy())
                writer.add_tensor(f"{binding.tensor}.lora_b", b.float().cpu().contiguous().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        try:
            GGUFFile(temporary)  # numpy's tofile does not report a full disk
        except FormatError as error:
            raise OSError(errno.ENOSPC, str(error)) from error


def export_mlx_adapter(loaded: LoadedModel, folder: Path, name: str = "default") -> None:
    """Write a folder that mlx-lm loads with `adapter_path`.

    MLX gives all layers one rank, so lower ranks are filled up with zeros; the scaling is inside lora_b.
    Layout: mlx-lm, tuner/utils.py (load_adapters) and tuner/lora.py: lora_a [in, r], lora_b [r, out].

    Raises:
        OutputError: it cannot be written.
    """
    pairs = _runtime_pairs(loaded, name)
    rank = max(a.shape[0] for a, _, _ in pairs.values())
    tensors = {}
    for path, (a, b, scaling) in pairs.items():
        missing = rank - a.shape[0]
        tensors[f"{path}.lora_a"] = functional.pad(a.T.float(), (0, missing)).contiguous()
        tensors[f"{path}.lora_b"] = functional.pad(b.T.float() * scaling, (0, 0, 0, missing)).contiguous()
    config = {
        "fine_tune_type": "lora",
        "model": str(loaded.path),
        "num_layers": loaded.model.config.num_hidden_layers,
        "lora_parameters": {
            "rank": rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": sorted({re.sub(r"^model\.layers\.\d+\.", "", path) for path in pairs}),
        },
    }
    with replacing_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_tensors(temporary / MLX_WEIGHTS, tensors, {"base_weights_sha256": loaded.weights_hash()})
