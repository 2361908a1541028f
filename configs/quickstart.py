"""CLIP on the embedded handwritten digits, in minutes and without a download.

python main.py --config=configs/quickstart.py
"""
