"""The doctor's questions: is the machine ready, does the run fit it?"""
