"""Files as such: atomic writes, strict JSON, safetensors headers, links. A leaf that knows no model."""
