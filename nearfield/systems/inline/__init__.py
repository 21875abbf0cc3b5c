"""InLine: linear attention whose rows differ where queries differ, and a local residual."""
