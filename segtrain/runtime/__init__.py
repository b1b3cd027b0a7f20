"""The process and the machine; nothing here depends on segmentation."""
