"""dwi_ml"""
