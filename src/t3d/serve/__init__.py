"""An OpenAI-compatible server with a playground page. Optional: `pip install t3d[serve]`."""
