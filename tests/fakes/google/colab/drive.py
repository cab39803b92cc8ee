"""`google.colab.drive` on a machine of `colab_machine.py`: what it checks, says and refuses, after googlecolab/colabtools.

The user's Drive is the folder `$FAKE_DRIVE`. A file `refused` beside it stands for a user who does not give his permission.
"""
import os
import subprocess


def mount(mountpoint, force_remount=False, timeout_ms=120_000, readonly=False):
    "Mount the user's Drive."
    if not os.path.exists("/var/colab/hostname"):
        raise NotImplementedError("Mounting drive is unsupported in this environment. Use PyDrive2 instead.")
    if not force_remount and os.path.isdir(os.path.join(mountpoint, "My Drive")):
        print(f'Drive already mounted at {mountpoint}; to attempt to forcibly remount, call drive.mount("{mountpoint}", force_remount=True).')
        return
    if force_remount:
        subprocess.run(["umount", "-l", mountpoint], stderr=subprocess.DEVNULL)
    if os.path.exists(os.path.join(os.path.dirname(os.environ["FAKE_DRIVE"]), "refused")):
        raise ValueError("mount failed")
    if " " in mountpoint or os.path.islink(mountpoint):
        raise ValueError("Mountpoint must not contain a space" if " " in mountpoint else "Mountpoint must not be a symlink")
    if os.path.isdir(mountpoint) and os.listdir(mountpoint):
        raise ValueError("Mountpoint must not already contain files")
    os.makedirs(mountpoint, exist_ok=True)
    subprocess.run(["mount", "--bind", os.environ["FAKE_DRIVE"], mountpoint], check=True)
    print(f"Mounted at {mountpoint}")


def flush_and_unmount(timeout_ms=86_400_000):
    "Unmount it again."
    subprocess.run(["umount", "-l", "/content/drive"], check=True)


def break_off():
    "What happens to the user, not what he calls: the program behind the mount dies, and every access gives errno 107."
    import ctypes
    subprocess.run(["umount", "-l", "/content/drive"], check=True)
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    if ctypes.CDLL(None, use_errno=True).mount(b"fuse", b"/content/drive", b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), "the dead mount could not be made")
    os.close(device)
