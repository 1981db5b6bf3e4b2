"""llama.cpp's own HTTP server with adapters; runs in the servers' own environment: python serving_llama_cpp.py FOLDER.

FOLDER is what `mediator export --to gguf` writes with adapters. Prints the address when it listens, ends when its
standard input does.
"""

import sys
from pathlib import Path

import xllamacpp as cpp


def main(folder: Path) -> None:
    """Serve a folder."""
    server = start(folder)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


def start(folder: Path) -> cpp.Server:
    """Load model.gguf with every other file beside it as an adapter that no request has by default."""
    settings = cpp.CommonParams()
    settings.model.path = str(folder / "model.gguf")
    settings.hostnames, settings.port = ["127.0.0.1"], 0
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 2048, 2, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.warmup, settings.verbosity = False, 1
    adapters = sorted(file for file in folder.glob("*.gguf") if file.name != "model.gguf")
    settings.lora_adapters = [cpp.CommonAdapterLoraInfo(str(file), 0.0) for file in adapters]
    settings.lora_init_without_apply = True
    return cpp.Server(settings)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
