"""aimv2-vlm."""
