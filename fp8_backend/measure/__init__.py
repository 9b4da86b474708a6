"""What every measurement needs: timing, accuracy limits, child processes, and what a result says about its run."""
