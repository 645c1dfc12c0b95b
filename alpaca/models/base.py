"""The base model of a folder, loaded for training or, with an adapter, for answering."""

import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from alpaca.common.console import progress, say
from alpaca.common.devices import DTYPES, check_devices, describe_device, pick_precision
from alpaca.common.errors import UserError
from alpaca.models.adapter_files import read_adapter
from alpaca.models.adapters import DEFAULT_BASE
from alpaca.models.base_files import EMBEDDING, HEAD, dims, fits_vocabulary, read_config, weight_files
from alpaca.models.base_weights import empty_model, load_base, pick_base_weights
from alpaca.models.facts import template_of
from alpaca.models.quantized import QuantizedLinear
from alpaca.models.tokenizer import load_tokenizer


def check_model_dir(model_dir):
    """The config.json of a model's folder; UserError where the folder cannot be a base. Asked before anything slow begins."""
    config = read_config(model_dir)
    weight_files(model_dir)
    return config


def check_vocabulary(tokenizer, rows, base):
    """UserError where a tokenizer's pieces and a base's `rows` of embeddings are not of one vocabulary."""
    pieces, source = len(tokenizer), tokenizer.source
    if not fits_vocabulary(pieces, rows):
        raise UserError(
            f"{source} has {pieces} pieces, {base} {rows} embeddings; use the {source.name} that belongs to it"
        )


def check_generation(args):
    """UserError for values of test's, predict's and chat's options that cannot be."""
    if args.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens={args.max_new_tokens}: expected 1 or more")
    rows = str(args.nested.get("batch_size", "auto"))
    if rows != "auto" and not (re.fullmatch("[0-9]+", rows) and int(rows) > 0):
        raise UserError(f"--batch_size={rows}: expected 1 or more, or auto")
    check_devices(args.nested.get("gpus") or args.nested.get("devices", "0"))
    if args.constrained not in ("auto", "True", "False"):
        raise UserError(f"--constrained={args.constrained}: expected auto, True, False")
    pick_precision(args.nested.get("precision", "auto"), "cuda" if torch.cuda.is_available() else "cpu")


def load_for_inference(
    adapter,
    train_args,
    facts,
    base_model,
    tokenizer_path,
    precision="auto",
    device=None,
    merge=False,
    base_weights="auto",
    template="auto",
    tokenizer=None,
):
    """(model, tokenizer) as the command line and what find_adapter returned say; the command line wins.

    Refuses, before the weights load, a base or a tokenizer that is not the adapter's. `merge`: add the LoRA to the
    weights, which then cost nothing more; the base alone is gone. On a quantized base it stays apart. device: of
    pick_device; None: the current one. tokenizer: that of load_base_tokenizer, if it is there already.
    """
    base = base_folder(adapter, train_args, base_model)
    config = check_model_dir(base)
    tokenizer = tokenizer or load_base_tokenizer(adapter, train_args, facts, base_model, tokenizer_path, template)
    check_vocabulary(tokenizer, config["vocab_size"], base)
    if adapter:
        check_fit(adapter, train_args, facts, base, tokenizer)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, count = ("cuda", torch.cuda.device_count()) if device == "auto" else (device, 1)
    precision = pick_precision(precision, kind)
    asked = f"模板: {tokenizer.template.name}"
    say(f"模型: {base}, LoRA: {adapter or '无'}, {asked}, {describe_device(kind, precision, count)}")
    base_weights = pick_base_weights(base_weights, train_args if adapter else None, kind, precision)
    model = load_base(base, DTYPES[precision], device, base_weights)
    if adapter:
        model = attach_adapter(model, adapter)
        if merge and base_weights == "full":
            model = merge_adapter(model)
    return model.eval(), tokenizer


def load_base_tokenizer(adapter, train_args, facts, base_model, tokenizer_path, template):
    """The tokenizer, with its template, as the command line and what find_adapter returned say."""
    base = base_folder(adapter, train_args, base_model)
    check_model_dir(base)
    return load_tokenizer(tokenizer_path or base, template_of(facts, template))


def base_folder(adapter, train_args, base_model):
    """The folder of the base: --base_model, else the one that the adapter says it was trained on, else the trainers'."""
    if base_model or not adapter:
        return base_model or DEFAULT_BASE
    if train_args:
        return train_args.model_dir
    named = read_adapter(adapter).config.get("base_model_name_or_path")
    if not isinstance(named, str) or not (Path(named) / "config.json").is_file():
        raise UserError(f"{adapter}: its base, {named!r}, is not here; name its folder with --base_model=…")
    return named


def attach_adapter(model, adapter, name="default"):
    """The model, bare or with other adapters, with that of a folder, in the weights' type and in use from now on."""
    dtype, adapter = model.dtype, _without_the_bases(read_adapter(adapter), model)
    config = _lora_config(adapter)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    else:
        model = PeftModel(model, config, name, autocast_adapter_dtype=False)
    llama = model.get_base_model()
    with torch.no_grad():
        for target, (a, b, _) in adapter.lora.items():
            layer = llama.get_submodule(target.removesuffix(".weight"))
            layer.lora_A[name].weight.copy_(a)
            layer.lora_B[name].weight.copy_(b)
        for target, tensor in adapter.saved.items():
            llama.get_submodule(target.removesuffix(".weight")).modules_to_save[name].weight.copy_(tensor)
    model.set_adapter(name)
    return model.to(dtype).requires_grad_(False).eval()


def merge_adapter(model):
    """The bare model of a PEFT model, with the LoRA in use added to its weights, and without any other."""
    causal = model.get_base_model()
    head = causal.lm_head
    if isinstance(head, LoraLayer) and head.weight is causal.model.embed_tokens.weight:
        # tied: PEFT would add the LoRA of the head to the embeddings as well
        head.base_layer.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in progress(layers, desc="合并 LoRA", unit="层"):
        layer.merge()
    merged = model.unload()
    # else the next resize of the embeddings would tie them again
    merged.config.tie_word_embeddings = merged.lm_head.weight is merged.model.embed_tokens.weight
    return merged


def _without_the_bases(adapter, model):
    """The Adapter without whole tensors that are the base's own, as files hold them that were made of a whole model."""
    llama = model.get_base_model() if isinstance(model, PeftModel) else model
    saved = {}
    for name, tensor in adapter.saved.items():
        module = llama.get_submodule(name.removesuffix(".weight"))
        module = getattr(module, "original_module", getattr(module, "base_layer", module))
        if isinstance(module, QuantizedLinear):
            raise UserError(
                f"{adapter.folder}: brings {name} as a whole, which a quantized base cannot take; use --base_weights=full"
            )
        if not torch.equal(module.weight, tensor.to(module.weight)):
            saved[name] = tensor
    if both := saved.keys() & adapter.lora.keys():
        raise UserError(
            f"{adapter.folder}: holds {min(both)} of another base, beside a LoRA for it; merge it into its base with "
            "model_hub/merge_llama_with_chinese_lora.py"
        )
    return adapter._replace(saved=saved)


def _lora_config(adapter):
    """PEFT's settings for exactly the tensors that an Adapter has: each gets its place, and no place stays untrained."""
    ranks = {target.removesuffix(".weight"): len(a) for target, (a, _, _) in adapter.lora.items()}
    alphas = {target.removesuffix(".weight"): len(a) * scaling for target, (a, _, scaling) in adapter.lora.items()}
    rank, alpha = next(iter(ranks.values()), 1), next(iter(alphas.values()), 1)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={module: value for module, value in ranks.items() if value != rank},
        alpha_pattern={module: value for module, value in alphas.items() if value != alpha},
        target_modules=list(ranks),
        modules_to_save=[target.removesuffix(".weight") for target in adapter.saved] or None,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def check_fit(adapter, train_args, facts, base, tokenizer):
    """UserError where an adapter was trained with another prompt, tokenizer or base than these.

    Of an adapter that another tool wrote only the shapes are known.
    """
    if train_args and facts["prompt_sha256"] != tokenizer.template.sha256:
        name = facts.get("template", "alpaca")
        raise UserError(
            f"{adapter}: was trained with another prompt template, a `{name}`, than {base} has now, `"
            f"{tokenizer.template.name}`; name the base it was trained on with --base_model, or train it again"
        )
    if train_args and facts["tokenizer_sha256"] != tokenizer.sha256:
        raise UserError(
            f"{tokenizer.source} is not the one that {adapter} was trained with "
            f"(that of {train_args.model_dir}); name that base with --base_model"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_model(base).state_dict().items()}
    adapter = read_adapter(adapter)
    for name, (a, b, _) in adapter.lora.items():
        _check_shape(adapter.folder, name, (len(b), a.shape[1]), shapes, base)
    for name, tensor in adapter.saved.items():
        if name in (EMBEDDING, HEAD) and name in shapes and len(tensor) != shapes[name][0]:
            raise UserError(
                f"{adapter.folder} brings embeddings for {len(tensor)} pieces, {base} has {shapes[name][0]}; merge it "
                "into its base with model_hub/merge_llama_with_chinese_lora.py"
            )
        _check_shape(adapter.folder, name, tuple(tensor.shape), shapes, base)


def _check_shape(adapter, name, shape, shapes, base):
    if shape != shapes.get(name):
        has = f"one of {dims(shapes[name])}" if name in shapes else "no such tensor"
        raise UserError(
            f"{adapter} does not fit {base}: it changes {name}, of size {dims(shape)}, and the model has {has}; name its "
            "base with --base_model"
        )
