"""Adapters: one package per trainer. Each imports only the libraries of its own trainer."""
