import sys

print("launched with", *sys.argv[1:])
